"""The run's clock and alarms: what stops a run, what warns, and what a record says."""

import json

import numpy as np
import pytest

from moejax import cli
from moejax import train as verb
from moejax.training import loop as loop_file
from moejax.training import meter as meter_file
from moejax.training.loop import train
from moejax.training.meter import Meter, NonFiniteLoss
from moejax.training.records import read_records
from tests import tiny


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


def alarms(shares, k=1, experts=4, carried=None):
    meter = Meter(1, 1.0, 1.0, carried)
    records = [{"step": 10 * i, "busiest": share} for i, share in enumerate(shares, start=1)]
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
    assert Meter(1, 1.0, 1.0).alarm({"step": 1}, 0.9, 1, 4) is None  # a dense model


def test_a_run_whose_routing_collapses_says_so_and_a_balanced_one_does_not(
    program, config, tmp_path, monkeypatch, capsys
):
    """A bias of 100 on one expert: all tokens choose it, and a rate of 0.01 cannot undo that."""
    train(config, tmp_path / "balanced")
    assert not [r for r in read_records(tmp_path / "balanced/metrics.jsonl") if r["kind"] == "alarm"]
    assert "collapses" not in capsys.readouterr().err

    class Collapsed(type(program)):
        def __init__(self):
            self.__dict__.update(vars(program))

        def __getattribute__(self, name):
            if name != "init":
                return super().__getattribute__(name)
            return lambda seed: _with_a_favourite(program.init(seed))

    monkeypatch.setattr(loop_file, "build_program", lambda *_: Collapsed())
    train(config, tmp_path / "collapsed")
    (alarm,) = [
        r for r in read_records(tmp_path / "collapsed/metrics.jsonl") if r["kind"] == "alarm"
    ]
    assert alarm["step"] == 6  # the third record of log_every = 2
    assert "one expert gets 100% of a layer's tokens" in alarm["message"]
    assert f"warning: {alarm['message']}" in capsys.readouterr().err


def _with_a_favourite(state):
    bias_LE = state.router_state.at[:, 2].set(100.0)
    return state._replace(router_state=bias_LE)


def test_a_run_that_diverges_stops_with_exit_code_1_and_keeps_what_was_saved(
    tmp_path, monkeypatch, capsys
):
    """The rate explodes after the checkpoint of step 3; clipping cannot help an infinite weight."""
    settings = {"steps": 12, "checkpoint_every": 3, "eval_every": 0, "log_every": 1}
    config = tiny.tiny(
        moe={"experts": 0}, optimizer={"learning_rate": 1e30, "clip": 0.0, "warmup": 11}, train=settings
    )
    monkeypatch.setattr(verb.CONFIG.__class__, "value", property(lambda flag: _value(flag)))
    values = {verb.CONFIG.name: config.to_dict(), verb.WORKDIR.name: str(tmp_path / "run")}

    def _value(flag):
        return values[flag.name]

    code = verb.main([])
    assert code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step ")
    records = read_records(tmp_path / "run/metrics.jsonl")
    step = int(error.split()[2].strip(":"))
    assert f"position {8 * step} of the data stream" in error
    assert [r["step"] for r in records] == list(range(1, step))
    steps = [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()]
    assert all(int(name) < step for name in steps)
    assert not (tmp_path / "run/summary.json").exists()
    assert cli.VERBS  # the verb is the one of the command line
