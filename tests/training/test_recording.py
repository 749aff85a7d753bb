"""Recording a run's routing and feeding it to another: bits, gradients, files, and what is
refused."""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import moe as spine
from moejax.config import Config
from moejax.data import Batch
from moejax.routing import Decisions, Recorded
from moejax.tracing import files, open_trace
from moejax.training.loop import train
from moejax.training.recording import Recorder, Recording, ReplayBatch
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


def given(aux) -> Recorded:
    """What a replay is given of what was traced, by row: [B, L, S, R]."""
    _, decisions = jax.device_get(aux["traced"])
    return Recorded(*(np.swapaxes(a, 0, 1) for a in decisions.recorded))


@functools.cache
def recorded_once(router: str):
    """One router's losses and routing, of two microbatches in which something drops."""
    moe = {} if router == "expert_choice" else TIGHT
    config = tiny.tiny(
        router={"name": router}, moe=moe, train={"accumulation": 2, "trace_every": 1}
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
    (_, again), _ = losses(config, params, given(aux))
    if parts == 2:
        assert again["loss"].tobytes() == aux["loss"].tobytes()
    assert again["loss"] == pytest.approx(float(aux["loss"]), rel=1e-6)
    for figure in ("load_LE", "drop", "left_behind"):
        np.testing.assert_array_equal(again[figure], aux[figure])
    assert aux["drop"] > 0
    assert given(aux).expert_TR.shape == (8, 2, 32, 2)
    assert given(aux).expert_TR.dtype == jnp.uint8


def test_a_replay_of_expert_choice() -> None:
    """Experts took tokens, up to E a token; listed by token, sums round otherwise."""
    params, (_, aux), _, _ = recorded_once("expert_choice")
    assert given(aux).expert_TR.shape == (8, 2, 32, 4)
    config = tiny.tiny(router={"name": "replay"}, train={"accumulation": 2})
    (_, again), _ = losses(config, params, given(aux))
    assert again["loss"] == pytest.approx(float(aux["loss"]), rel=1e-6)
    np.testing.assert_array_equal(again["load_LE"], aux["load_LE"])


def gradient_of_router(gradients) -> np.ndarray:
    return gradients["stacks"][0]["blocks"][0]["feed_forward"]["w_router_DE"]


def test_live_weights_train_the_router_as_the_recorded_run_does() -> None:
    params, (_, aux), gradients, moe = recorded_once("topk")
    kept = given(aux)
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
        config = tiny.tiny(router=TOPK, train={"trace_every": int(record)})
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
        train={"steps": 5, "log_every": 1, "checkpoint_every": 3, "trace_every": 1},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "TOKENS_A_FILE", 2 * 200)
        train(config, workdir, quiet=True)
    return workdir


def trained(workdir):
    return [r for r in read_records(workdir / "metrics.jsonl") if r["kind"] == "train"]


def test_a_recorded_run_is_replayed(recorded_run, tmp_path) -> None:
    names = sorted(path.name for path in (recorded_run / "trace").iterdir())
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
        ({"data": {"batch": 16}}, "traced with data.batch=8, this run has 16"),
        ({"data": {"sequence": 16}}, "traced with data.sequence=32, this run has 16"),
        ({"model": {"layers": 3}}, "traced with MoE layers=2, this run has 3"),
        ({"moe": {"experts": 8}}, "traced with moe.experts=4, this run has 8"),
        ({"train": {"steps": 6}}, "traced up to step 5, this run has train.steps=6"),
        (
            {"train": {"replay": str(tmp_path)}},
            "holds no trace; train that run with",
        ),
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
        tiny.tiny(moe={"experts": 0}, train={"trace_every": 1})


def test_the_trace_of_a_run_holds_its_text_and_its_loads(recorded_run) -> None:
    trace = open_trace(recorded_run / "trace")
    assert trace.meta.layers == (0, 1) and trace.meta.domains == ("code", "prose")
    for step, record in enumerate(trained(recorded_run), start=1):
        part, batch = trace.part(step), tiny.dataset().train_batch(8 * (step - 1), seed=0)
        assert (part.number, part.position) == (step, 8 * step)
        valid_BS = batch.valid_BS
        np.testing.assert_array_equal(part.tokens_B, valid_BS.sum(1))
        for name in ("token", "target", "position"):
            rows_BS = getattr(batch, f"{name}s_BS" if name != "position" else "position_BS")
            np.testing.assert_array_equal(getattr(part.trace, f"{name}_T"), rows_BS[valid_BS])
        domain_BS = np.broadcast_to(batch.domain_B[:, None], valid_BS.shape)
        np.testing.assert_array_equal(part.trace.domain_T, domain_BS[valid_BS])
        load_LE = [np.bincount(part.trace.expert_TLR[:, i].ravel(), minlength=4) for i in (0, 1)]
        np.testing.assert_allclose(
            np.array(load_LE) / (2 * len(part.trace)), record["load_LE"], atol=1e-6
        )


def test_what_was_not_traced_is_named(recorded_run, tmp_path) -> None:
    valid_BS = tiny.dataset().train_batch(16, seed=0).valid_BS
    recording = Recording(recorded_run)
    with pytest.raises(ValueError, match="step 6 was not traced"):
        recording.step(6, 48, slice(None), valid_BS)
    with pytest.raises(ValueError, match="step 3 .* rows that end at 24, .* those that end at 80"):
        recording.step(3, 80, slice(None), valid_BS)
    shutil.copytree(recorded_run / "trace", tmp_path / "trace")
    (tmp_path / "trace/00000003-00000003.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="step 3 cannot be read: 00000003-00000003.npz is broken"):
        Recording(tmp_path).step(3, 24, slice(None), valid_BS)


def traced(step: int) -> tuple[Batch, Decisions]:
    """What the tiny config's step might give: its own number everywhere."""
    shape = (2, 8, 32)
    value = jnp.full(shape, float(step))
    index, weight = jnp.full((*shape, 2), step % 4, jnp.uint8), jnp.full((*shape, 2), float(step))
    dropped = jnp.zeros((*shape, 2), bool)
    return tiny.dataset().train_batch(0, seed=0), Decisions(
        index, weight, dropped, value, value, None
    )


def test_a_share_of_the_rows_is_read(tmp_path) -> None:
    """Tokens that are not real are not in the trace, and go nowhere in the replay."""
    config = tiny.tiny(router=TOPK, train={"trace_every": 1})
    recorder = Recorder(tmp_path, config, tiny.dataset(), 7, 0)
    batch, decisions = traced(1)
    valid_BS = np.random.default_rng(0).random((8, 32)) < 0.7
    weight_LBSR = np.arange(2 * 8 * 32 * 2, dtype=np.float32).reshape(2, 8, 32, 2) + 1
    recorder.add(
        1, 8, (batch._replace(valid_BS=valid_BS), decisions._replace(weight_TR=weight_LBSR))
    )
    recorder.flush()
    recording = Recording(tmp_path)
    assert (recording.seed, recording.width) == (7, 2)
    for rows in (slice(None), slice(2, 6), np.array([1, 2, 7])):
        kept = recording.step(1, 8, rows, valid_BS[rows])
        real_BLSR = valid_BS[rows][:, None, :, None]
        weight_BLSR = np.swapaxes(weight_LBSR, 0, 1)[rows]
        np.testing.assert_array_equal(kept.weight_TR, np.where(real_BLSR, weight_BLSR, 0))
        want_BLSR = np.broadcast_to(np.where(real_BLSR, 1, 4), weight_BLSR.shape)
        np.testing.assert_array_equal(kept.expert_TR, want_BLSR)


def test_every_third_step_is_traced_once_also_after_a_cut(tmp_path) -> None:
    config = tiny.tiny(router=TOPK, train={"trace_every": 3})
    first = Recorder(tmp_path, config, tiny.dataset(), 7, 0)
    for step in range(1, 10):
        first.add(step, 8 * step, traced(step))
        if step == 4:
            first.flush()  # a checkpoint; the rest is lost
    second = Recorder(tmp_path, config, tiny.dataset(), 7, 4)
    for step in range(5, 8):
        second.add(step, 8 * step, traced(step + 100))
    second.flush()
    there = open_trace(tmp_path / "trace")
    assert (there.every, there.last, there.info["seed"]) == (3, 6, 7)
    tokens = len(there.part(3).trace)
    assert there.read().weight_TLR[:, 0, 0].tolist() == [3.0] * tokens + [106.0] * tokens
    assert there.cut == ""
    with pytest.raises(ValueError, match="traced at one step in 3 .* train.trace_every=1"):
        Recording(tmp_path)
