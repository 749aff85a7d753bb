"""Recording a run's routing and feeding it to another: bits, gradients, files, and what is
refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import moe as spine
from moejax.config import Config
from moejax.routing import Recorded
from moejax.training import recording as recording_file
from moejax.training.loop import train
from moejax.training.recording import Recorder, Recording, ReplayBatch, index_dtype
from moejax.training.records import read_records
from moejax.training.state import make_graph
from moejax.training.step import loss_fn
from tests import tiny
from tests.training.test_upcycle import params_of

TIGHT = {"capacity_factor": 1.0, "groups": "sequence"}
TOPK = {"name": "topk", "k": 2}


def losses(config: Config, params, recorded=None):
    """(loss, aux), gradients by the parameters, of one batch."""
    graph = make_graph(config, tiny.VOCABULARY)
    call = functools.partial(loss_fn, graph=graph, config=config)
    state = None
    if config.router.name == "loss_free":
        bias_LE = np.random.default_rng(0).normal(0, 0.1, (2, 4))
        state = jnp.asarray(bias_LE, jnp.float32)
    batch = tiny.dataset().train_batch(0, seed=0)
    if recorded is not None:
        batch = ReplayBatch(*batch, recorded)
    run = jax.jit(jax.value_and_grad(call, has_aux=True))
    return run(params, state, batch, jax.random.key(3))


@functools.cache
def recorded_once(router: str):
    """One router's losses and routing, of two microbatches in which something drops."""
    moe = {} if router == "expert_choice" else TIGHT
    config = tiny.tiny(
        router={"name": router}, moe=moe, train={"accumulation": 2, "record_routing": True}
    )
    params = params_of(config, tiny.VOCABULARY)
    return params, *losses(config, params), moe


@pytest.mark.parametrize(
    ("router", "parts"), [("topk", 1), ("topk", 2), ("gshard_top2", 2), ("loss_free", 2)]
)
def test_a_replay_has_the_same_loss_to_the_bit(router: str, parts: int) -> None:
    """Also where microbatches are cut otherwise: the recording lies in rows."""
    params, (_, aux), _, moe = recorded_once(router)
    order = "token_major" if router == "loss_free" else "k_major"
    config = tiny.tiny(
        router={"name": "replay", "order": order}, moe=moe, train={"accumulation": parts}
    )
    (_, again), _ = losses(config, params, jax.device_get(aux["recorded"]))
    if parts == 2:
        assert again["loss"].tobytes() == aux["loss"].tobytes()
    assert again["loss"] == pytest.approx(float(aux["loss"]), rel=1e-6)
    for figure in ("load_LE", "drop", "left_behind"):
        np.testing.assert_array_equal(again[figure], aux[figure])
    assert aux["drop"] > 0
    assert aux["recorded"].expert_TR.shape == (8, 2, 32, 2)
    assert aux["recorded"].expert_TR.dtype == jnp.uint8


def test_a_replay_of_expert_choice() -> None:
    """Experts took tokens, up to E a token; listed by token, sums round otherwise."""
    params, (_, aux), _, _ = recorded_once("expert_choice")
    assert aux["recorded"].expert_TR.shape == (8, 2, 32, 4)
    config = tiny.tiny(router={"name": "replay"}, train={"accumulation": 2})
    (_, again), _ = losses(config, params, jax.device_get(aux["recorded"]))
    assert again["loss"] == pytest.approx(float(aux["loss"]), rel=1e-6)
    np.testing.assert_array_equal(again["load_LE"], aux["load_LE"])


def gradient_of_router(gradients) -> np.ndarray:
    return gradients["stacks"][0]["blocks"][0]["feed_forward"]["w_router_DE"]


def test_live_weights_train_the_router_as_the_recorded_run_does() -> None:
    params, (_, aux), gradients, moe = recorded_once("topk")
    kept = jax.device_get(aux["recorded"])
    for weight in ("softmax", "recorded"):
        router = {"name": "replay", "weight": weight}
        config = tiny.tiny(router=router, moe=moe, train={"accumulation": 2})
        _, again = losses(config, params, kept)
        if weight == "softmax":
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
                again,
                gradients,
            )
            assert np.abs(gradient_of_router(again)).max() > 1e-4
        else:
            assert np.abs(gradient_of_router(again)).max() == 0


def test_recording_costs_nothing_when_it_is_off(monkeypatch) -> None:
    """Nothing of it is traced; and what is traced with it on is more."""

    def jaxpr(record: bool) -> str:
        config = tiny.tiny(router=TOPK, train={"record_routing": record})
        graph = make_graph(config, tiny.VOCABULARY)
        call = functools.partial(loss_fn, graph=graph, config=config)
        batch = tiny.dataset().train_batch(0, seed=0)
        params = params_of(config, tiny.VOCABULARY)
        text = str(jax.make_jaxpr(call)(params, None, batch, jax.random.key(0)))
        return re.sub(r"0x[0-9a-f]+", "", text)

    off, on = jaxpr(False), jaxpr(True)
    calls = []
    monkeypatch.setattr(spine, "_decisions", lambda *arguments: calls.append(arguments))
    assert jaxpr(False) == off and calls == []
    # With it on, and its one function giving nothing, the program is the one without it.
    assert jaxpr(True) == off and calls
    assert on != off and "u8[" in on and "u8[" not in off


def replaying(workdir, router=None, **options) -> Config:
    router = {"name": "replay", "weight": "softmax", **(router or {})}
    every = {"steps": 4, "log_every": 1, "eval_every": 0}
    return tiny.tiny(router=router, train={**every, "replay": str(workdir), **options})


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory):
    """Five steps, in files of two, cut by a checkpoint."""
    workdir = tmp_path_factory.mktemp("recorded") / "run"
    config = tiny.tiny(
        router=TOPK,
        train={"steps": 5, "log_every": 1, "checkpoint_every": 3, "record_routing": True},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording_file, "STEPS_A_FILE", 2)
        train(config, workdir, quiet=True)
    return workdir


def trained(workdir):
    return [r for r in read_records(workdir / "metrics.jsonl") if r["kind"] == "train"]


def test_a_recorded_run_is_replayed(recorded_run, tmp_path) -> None:
    names = sorted(path.name for path in (recorded_run / "routing").iterdir())
    assert names == [
        "00000001-00000002.npz",
        "00000003-00000003.npz",
        "00000004-00000005.npz",
        "meta.json",
    ]
    originals = trained(recorded_run)
    # Five steps, so that the schedule is the same.
    config = replaying(recorded_run, steps=5)
    train(config, tmp_path / "same", quiet=True)
    for ours, theirs in zip(trained(tmp_path / "same"), originals, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["load_LE"] == theirs["load_LE"]
    # Another seed's weights, on the same rows with the same routing.
    config = replaying(recorded_run, steps=5, seed=1)
    train(config, tmp_path / "other", quiet=True)
    for ours, theirs in zip(trained(tmp_path / "other"), originals, strict=True):
        assert ours["load_LE"] == theirs["load_LE"]
        assert ours["loss"] != theirs["loss"] and np.isfinite(ours["loss"])


def test_what_does_not_fit_is_refused_and_nothing_written(recorded_run, tmp_path) -> None:
    for changes, message in (
        ({"data": {"batch": 16}}, "recorded with data.batch=8, this run has 16"),
        ({"data": {"sequence": 16}}, "recorded with data.sequence=32, this run has 16"),
        ({"model": {"layers": 3}}, "recorded with MoE layers=2, this run has 3"),
        ({"moe": {"experts": 8}}, "recorded with moe.experts=4, this run has 8"),
        ({"train": {"steps": 6}}, "recorded up to step 5, this run has train.steps=6"),
        ({"train": {"replay": str(tmp_path)}}, "holds no recorded routing; train that run with"),
        ({"train": {"replay": ""}}, "router.name='replay' needs train.replay"),
        ({"data": {"validation": 0.3}}, "text of fingerprint .*, this run reads"),
    ):
        sections = {"router": {"name": "replay"}, **changes}
        sections["train"] = {"steps": 5, "replay": str(recorded_run), **changes.get("train", {})}
        with pytest.raises(ValueError, match=message) as caught:
            train(tiny.tiny(**sections), tmp_path / "run", quiet=True)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="train.replay is for router.name='replay', not 'topk'"):
        tiny.tiny(train={"replay": "x"})
    with pytest.raises(ValueError, match="moe.experts=0 routes nothing"):
        tiny.tiny(moe={"experts": 0}, train={"record_routing": True})


def arrays(step: int, width: int = 2) -> Recorded:
    """What a step of the tiny config might record: its own number everywhere."""
    shape = (8, 2, 32, width)
    return Recorded(jnp.full(shape, step % 4, jnp.uint8), jnp.full(shape, float(step)))


def test_files_hold_every_step_once_after_a_cut(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(recording_file, "STEPS_A_FILE", 3)
    config = tiny.tiny(router=TOPK)
    first = Recorder(tmp_path, config, 7, "text", 0)
    for step in range(1, 9):  # files 1-3, 4-4 (a checkpoint), 5-7; step 8 is lost
        first.add(step, 8 * step, arrays(step))
        if step == 4:
            first.flush()
    assert len(first._steps) == 1  # no more than a file's steps are ever held
    second = Recorder(tmp_path, config, 7, "text", 4)
    for step in range(5, 7):
        second.add(step, 8 * step, arrays(step + 100))
    second.flush()
    reader = Recording(tmp_path)
    assert (reader.seed, reader.width) == (7, 2)
    for step in (1, 4, 5, 6, 2):
        kept = reader.step(step, 8 * step, slice(2, 6))
        assert kept.weight_TR.shape == (4, 2, 32, 2)
        assert np.all(kept.weight_TR == (step if step < 5 else step + 100))
        assert kept.expert_TR.dtype == np.uint8
    with pytest.raises(ValueError, match="step 7 was not recorded"):
        reader.step(7, 56, slice(0, 8))
    with pytest.raises(ValueError, match="step 2 .* rows that end at 16, .* those that end at 80"):
        reader.step(2, 80, slice(0, 8))


def test_the_index_has_room_for_nowhere() -> None:
    # E itself stands for nowhere: 255 fits a byte, 256 does not.
    assert index_dtype(255) is np.uint8 and index_dtype(256) is np.uint16
