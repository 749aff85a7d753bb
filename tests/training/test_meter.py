"""The run's clock and alarms: what stops a run, what warns, and what a record says."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moejax.training import loop as loop_file
from moejax.training import meter as meter_file
from moejax.training.loop import train
from moejax.training.meter import Meter, NonFiniteLoss
from moejax.training.records import read_records
from moejax.training.state import shardings


class Clock:
    """Stands in for the time module: seconds pass when told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meter_file, "time", clock)
    return clock


def metrics(loss=2.0, grad_norm=1.0, **rest):
    return {"loss": np.float32(loss), "grad_norm": np.float32(grad_norm), **rest}


def test_rates_by_hand(clock):
    """3 steps in 6 s, of 100 tokens and 50 FLOP each, where 1000 FLOP/s would be possible."""
    meter = Meter(tokens=100, flops=50.0, peak=1000.0)
    settled = []
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        settled.append(meter.push(step, 8 * step, metrics(loss)))
        clock.now += 2.0
    settled.append(meter.flush())
    assert settled == [None, 1, 2, 3]  # one step late
    record = meter.record(3, learning_rate=0.1)
    assert record["loss"] == 2.0  # the mean since the last record
    assert record["seconds"] == meter.seconds == pytest.approx(6.0)
    assert record["tokens_per_s"] == pytest.approx(3 * 100 / 6)
    assert record["mfu"] == pytest.approx(3 * 50 / 6 / 1000)
    assert (record["kind"], record["step"], record["learning_rate"]) == ("train", 3, 0.1)


def test_evaluation_and_saving_are_not_training_time(clock):
    meter = Meter(100, 50.0, 1000.0, {"seconds": 40.0})
    meter.push(1, 8, metrics())
    clock.now += 2.0
    meter.flush()
    clock.now += 500.0  # evaluates
    meter.push(2, 16, metrics())
    clock.now += 4.0
    meter.flush()
    assert meter.seconds == pytest.approx(46.0)
    assert meter.record(2, 0.1)["tokens_per_s"] == pytest.approx(2 * 100 / 6)


def test_what_is_carried_lets_a_resumed_run_write_the_same_record(clock):
    whole, cut = Meter(1, 1.0, 1.0), Meter(1, 1.0, 1.0)
    for meter in (whole, cut):
        meter.push(1, 8, metrics(5.0))
        meter.flush()
    resumed = Meter(1, 1.0, 1.0, json.loads(json.dumps(cut.carried())))
    for meter in (whole, resumed):
        meter.push(2, 16, metrics(3.0))
        meter.flush()
    assert resumed.record(2, 0.1)["loss"] == whole.record(2, 0.1)["loss"] == 4.0


@pytest.mark.parametrize(("loss", "norm"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan)])
def test_what_is_not_finite_names_the_step_and_the_batch(loss, norm):
    meter = Meter(1, 1.0, 1.0)
    meter.push(6, 48, metrics())
    meter.push(7, 56, metrics(loss, norm))
    with pytest.raises(NonFiniteLoss, match=r"step 7: loss .* position 56 ") as caught:
        meter.push(8, 64, metrics())
    assert "\n" not in str(caught.value)


def alarms(shares, k=1, experts=4, carried=None, load=None):
    meter = Meter(1, 1.0, 1.0, carried)
    records = [
        {"step": 10 * i, "busiest": share, "load_LE": load or [[share, *[(1 - share) / 3] * 3]]}
        for i, share in enumerate(shares, start=1)
    ]
    return [meter.alarm(record, 0.9, k, experts) for record in records], meter


def test_the_alarm_needs_three_records_in_a_row_and_rings_once():
    messages, _ = alarms([0.95, 0.95, 0.5, 0.95, 0.95, 0.95, 0.95])
    assert [message is not None for message in messages] == [False] * 5 + [True, False]
    assert "at step 60 one expert gets 95% of a layer's tokens (even: 25%)" in messages[5]
    assert "\n" not in messages[5]


def test_the_alarm_counts_on_after_a_resume():
    _, meter = alarms([0.95, 0.95])
    messages, _ = alarms([0.95], carried=meter.carried())
    assert messages[0]


def test_no_alarm_where_balance_is_fair_or_every_token_visits_every_expert():
    assert not any(alarms([0.6] * 5, k=2)[0])
    assert not any(alarms([1.0] * 5, k=4)[0])
    assert not any(alarms([1.0] * 5, load=[[0.3, 0.3, 0.2, 0.2]])[0])  # all are busy
    assert any(alarms([1.0] * 5, k=2, load=[[0.25] * 4, [0.5, 0.5, 0.0, 0.0]])[0])
    assert Meter(1, 1.0, 1.0).alarm({"step": 1}, 0.9, 1, 4) is None  # a dense model


def alarms_of(workdir):
    return [r for r in read_records(workdir / "metrics.jsonl") if r["kind"] == "alarm"]


def test_a_run_whose_routing_collapses_says_so_and_a_balanced_one_does_not(
    program, config, tmp_path, monkeypatch, capsys
):
    """A bias of 100 on one expert: all tokens choose it, and a rate of 0.01 cannot undo that."""
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, collapse_share=0.99)
    )
    train(config, tmp_path / "balanced")
    assert alarms_of(tmp_path / "balanced") == []
    assert "collapses" not in capsys.readouterr().err

    def init(seed, count_V):
        state = program.init(seed, count_V)
        bias_LE = state.router_state.at[:, 2].set(100.0)
        return jax.device_put(state._replace(router_state=bias_LE), shardings(state, program.mesh))

    rigged = dataclasses.replace(program, init=init)
    monkeypatch.setattr(loop_file, "build_program", lambda *_: rigged)
    train(config, tmp_path / "collapsed")
    (alarm,) = alarms_of(tmp_path / "collapsed")
    assert alarm["step"] == 6  # the third record of log_every = 2
    assert "one expert gets 100% of a layer's tokens" in alarm["message"]
    assert f"warning: {alarm['message']}" in capsys.readouterr().err
