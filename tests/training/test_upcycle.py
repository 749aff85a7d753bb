"""Sparse upcycling: what the new model computes at step 0, what diverges after it, what is
refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moejax.config import Config
from moejax.model import Transformer
from moejax.model.layers import FeedForward
from moejax.model.moe import MoE
from moejax.training.checkpoint import check_claim
from moejax.training.loop import train
from moejax.training.optimizer import make_optimizer
from moejax.training.records import read_records
from moejax.training.state import TrainState, make_graph
from moejax.training.step import train_step
from moejax.training.upcycle import check_upcycle, upcycle, upcycle_state
from tests import tiny
from tests.model.tiny import VOCAB, graph_of, tiny_config, tokens


def filled(tree):
    """Random arrays of these shapes: no model is initialised, which would take seconds."""
    random = np.random.default_rng(0)

    def leaf(path, a):
        scale = 1.0 if path[-1].key == "scale_D" else 0.0
        return jnp.asarray(scale + 0.3 * random.normal(size=a.shape), a.dtype)

    return jax.tree.map_with_path(leaf, tree)


def params_of(config: Config, vocab: int = VOCAB):
    model = nnx.eval_shape(lambda: Transformer(config, vocab, nnx.Rngs(0)))
    return filled(nnx.to_pure_dict(nnx.state(model)))


def logits(config: Config, params) -> jax.Array:
    run = jax.jit(lambda p: nnx.merge(graph_of(config), p)(tokens())[0])
    return run(params)


def upcycled(**changes):
    """Logits of the dense model, and of the model with experts made from it."""
    layers = changes.pop("layers", 2)
    router = changes.pop("router", "topk")
    options = changes.pop("options", {"k": 2, "renormalise": True})
    old = tiny_config(moe__experts=0, model__layers=layers)
    new = tiny_config(router, options, model__layers=layers, **changes)
    dense, fresh = params_of(old), params_of(new)
    return logits(old, dense), logits(new, upcycle(dense, fresh, old, new))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe__dispatch": "gather"},
        {"layers": 5, "moe__first_dense": 1, "moe__every": 2},
        {"router": "loss_free", "options": {"k": 2, "renormalise": True}},
        # Two shards of width 6: the four experts are two copies of each, chosen in pairs.
        {"moe__ffn": 6},
        {"moe__ffn": 6, "options": {"k": 4, "renormalise": True}},
        # Three shards, of which one is shared: four routed experts are two copies of the others.
        {"moe__ffn": 4, "moe__shared": 1},
        # Two of three are shared: a routed expert is the third shard, with weights that sum to 1.
        {"moe__ffn": 4, "moe__shared": 2},
    ],
    ids=str,
)
def test_weights_that_sum_to_one_keep_the_function(changes) -> None:
    dense_BSV, moe_BSV = upcycled(**changes)
    assert np.abs(dense_BSV).max() > 0.5
    np.testing.assert_allclose(moe_BSV, dense_BSV, atol=5e-5)


def test_shards_met_unequally_often_change_the_function() -> None:
    # k = 3 of two shards: one is met twice. So the test above can fail.
    dense_BSV, moe_BSV = upcycled(moe__ffn=6, options={"k": 3, "renormalise": True})
    assert np.abs(dense_BSV - moe_BSV).max() > 1e-2


def layer_of(new: Config, old: Config):
    """A layer with experts made from a dense one, and both layers' outputs for random tokens."""
    dense, fresh = params_of(old), params_of(new)
    made = upcycle(dense, fresh, old, new)

    def first(params):
        block = params["stacks"][0]["blocks"][0]["feed_forward"]
        return jax.tree.map(lambda a: a[0], block)

    x_BSD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8)), jnp.float32)
    moe = nnx.eval_shape(lambda: MoE(new.model, new.moe, new.router, rngs=nnx.Rngs(0)))
    ffn = nnx.eval_shape(lambda: FeedForward(old.model, old.model.ffn, nnx.Rngs(0)))

    def both(of_moe, of_ffn):
        y_BSD, _ = nnx.merge(nnx.graphdef(moe), of_moe)(x_BSD)
        return y_BSD, nnx.merge(nnx.graphdef(ffn), of_ffn)(x_BSD)

    y_BSD, dense_BSD = jax.jit(both)(first(made), first(dense))
    return x_BSD, first(made)["w_router_DE"], y_BSD, dense_BSD


@pytest.mark.parametrize("k", [1, 2])
def test_raw_weights_scale_the_layer_by_the_chosen_probabilities(k: int) -> None:
    old, new = tiny_config(moe__experts=0), tiny_config("topk", {"k": k})
    x_BSD, w_DE, y_BSD, dense_BSD = layer_of(new, old)
    chosen_BSK, _ = jax.lax.top_k(jax.nn.softmax(x_BSD @ w_DE), k)
    np.testing.assert_allclose(y_BSD, chosen_BSK.sum(-1, keepdims=True) * dense_BSD, atol=1e-5)
    assert np.abs(y_BSD - dense_BSD).max() > 0.1


def test_experts_are_copies_the_rest_is_copied_the_router_is_new() -> None:
    old, new = tiny_config(moe__experts=0), tiny_config()
    dense, fresh = params_of(old), params_of(new)
    made = upcycle(dense, fresh, old, new)
    ours, theirs, own = (p["stacks"][0]["blocks"][0] for p in (made, dense, fresh))
    for name in ("w_in", "w_gate"):
        for expert in range(4):
            np.testing.assert_array_equal(
                ours["feed_forward"][f"{name}_EDF"][:, expert],
                theirs["feed_forward"][f"{name}_DF"],
            )
    np.testing.assert_array_equal(
        ours["feed_forward"]["w_out_EFD"][:, 3], theirs["feed_forward"]["w_out_FD"]
    )
    router, fresh_router = (p["feed_forward"]["w_router_DE"] for p in (ours, own))
    np.testing.assert_array_equal(router, fresh_router)
    tiny.assert_identical(ours["attention"], theirs["attention"])
    tiny.assert_identical(made["embed_VD"], dense["embed_VD"])


def test_shards_of_finer_experts_by_hand() -> None:
    # Three shards of width 4 with one shared: experts 0 and 2 are shard 1, experts 1 and 3 shard 2,
    # their output times 2; router columns in pairs.
    old, new = tiny_config(moe__experts=0), tiny_config(moe__ffn=4, moe__shared=1)
    dense = params_of(old)
    made = upcycle(dense, params_of(new), old, new)
    ours, theirs = (p["stacks"][0]["blocks"][0]["feed_forward"] for p in (made, dense))
    for expert, shard in enumerate((1, 2, 1, 2)):
        part = slice(4 * shard, 4 * shard + 4)
        np.testing.assert_array_equal(
            ours["w_gate_EDF"][:, expert], theirs["w_gate_DF"][:, :, part]
        )
        np.testing.assert_array_equal(ours["w_out_EFD"][:, expert], 2 * theirs["w_out_FD"][:, part])
    np.testing.assert_array_equal(ours["shared"]["w_out_FD"], theirs["w_out_FD"][:, :4])
    router_LDE = np.asarray(ours["w_router_DE"])
    np.testing.assert_array_equal(router_LDE[..., 0::2], router_LDE[..., 1::2])
    assert np.abs(router_LDE[..., 0] - router_LDE[..., 2]).max() > 0.01


DENSE = tiny.tiny(moe={"experts": 0}, train={"steps": 4, "log_every": 1})


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """A dense run of four steps: its folder and its summary."""
    workdir = tmp_path_factory.mktemp("dense") / "run"
    return workdir, train(DENSE, workdir, quiet=True)


TOPK = {"name": "topk", "k": 2, "renormalise": True}


def from_dense(workdir, **options) -> Config:
    every = {"steps": 8, "log_every": 1, "eval_every": 1, "checkpoint_every": 0}
    return tiny.tiny(router=TOPK, train={**every, "upcycle": str(workdir), **options})


def records(workdir, kind: str):
    return [r for r in read_records(workdir / "metrics.jsonl") if r["kind"] == kind]


@pytest.fixture(scope="module")
def started(dense_run, tmp_path_factory):
    """A run with experts, through the same path as the command line."""
    workdir = tmp_path_factory.mktemp("upcycled") / "run"
    train(from_dense(dense_run[0], steps=6), workdir, quiet=True)
    return workdir


def test_a_run_starts_where_the_dense_one_ended(dense_run, started) -> None:
    # The first update has learning rate 0, so the evaluation at step 1 is that of step 0.
    first = records(started, "eval")[0]
    assert first["step"] == 1
    assert first["bpb"] == pytest.approx(dense_run[1]["bpb"], rel=1e-5)
    assert records(started, "eval")[-1]["bpb"] < first["bpb"]
    there = json.loads((started / "config.json").read_text())
    assert there["train"]["upcycle"] == str(dense_run[0])


def test_copies_diverge_once_they_are_trained(started) -> None:
    config = from_dense("x", steps=6)
    state = tiny.saved_state(started, config)
    w_LEDF = state.params["stacks"][0]["blocks"][0]["feed_forward"]["w_in_EDF"]
    assert min(np.abs(w_LEDF[:, 0] - w_LEDF[:, e]).max() for e in (1, 2, 3)) > 1e-5


def test_copies_diverge_after_one_step() -> None:
    old, new = tiny.tiny(moe={"experts": 0}), tiny.tiny(router=TOPK)
    optimizer = optax.sgd(1.0)
    fresh, dense = (first_state(c, optimizer) for c in (new, old))
    state = upcycle_state(dense, fresh, old, new)
    graph = make_graph(new, tiny.VOCABULARY)
    step = functools.partial(train_step, graph=graph, config=new, optimizer=optimizer)
    after, _ = jax.jit(step)(state, tiny.dataset().train_batch(0, seed=0))

    def apart(state) -> float:
        w_LEDF = state.params["stacks"][0]["blocks"][0]["feed_forward"]["w_in_EDF"]
        return min(float(np.abs(w_LEDF[:, 0] - w_LEDF[:, e]).max()) for e in (1, 2, 3))

    assert apart(state) == 0.0
    assert apart(after) > 1e-5


def first_state(config: Config, optimizer):
    params, zero = params_of(config, tiny.VOCABULARY), jnp.zeros((), jnp.int32)
    opt_state = optimizer.init(params)
    return TrainState(zero, zero, jnp.zeros(2, jnp.uint32), params, opt_state, None)


def counts_and_moments(opt_state):
    adam = [s for s in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(s)]
    schedule = [s for s in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(s)]
    return adam[0], schedule[0]


def is_adam(s) -> bool:
    return isinstance(s, optax.ScaleByAdamState)


def is_schedule(s) -> bool:
    return isinstance(s, optax.ScaleByScheduleState)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("goes_on", [False, True])
def test_what_is_carried_besides_the_weights(dense_run, carried: bool, goes_on: bool) -> None:
    new = from_dense("x", upcycle_optimizer=carried, upcycle_step=goes_on)
    dense = tiny.saved_state(dense_run[0], DENSE)
    fresh = first_state(new, make_optimizer(new.optimizer, new.train.steps))
    state = upcycle_state(dense, fresh, DENSE, new)
    adam, schedule = counts_and_moments(state.opt_state)
    assert int(state.step) == int(schedule.count) == (4 if goes_on else 0)
    assert int(state.position) == (32 if goes_on else 0)
    assert int(adam.count) == (4 if carried else 0)
    mu = adam.mu["stacks"][0]["blocks"][0]["feed_forward"]
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    assert np.abs(mu["w_router_DE"]).max() == 0
    old_adam, _ = counts_and_moments(dense.opt_state)
    theirs = old_adam.mu["stacks"][0]["blocks"][0]["feed_forward"]
    want = theirs["w_in_DF"] if carried else 0 * theirs["w_in_DF"]
    assert np.abs(theirs["w_in_DF"]).max() > 0
    for expert in range(4):
        np.testing.assert_array_equal(mu["w_in_EDF"][:, expert], want)


def test_a_run_that_goes_on_reads_on(dense_run, tmp_path) -> None:
    config = from_dense(dense_run[0], steps=6, upcycle_optimizer=True, upcycle_step=True)
    train(config, tmp_path / "run", quiet=True)
    assert [r["step"] for r in records(tmp_path / "run", "train")] == [5, 6]
    state = tiny.saved_state(tmp_path / "run", config)
    assert (int(state.step), int(state.position)) == (6, 48)
    late = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    with pytest.raises(ValueError, match="is at step 4 already; raise train.steps=4"):
        train(late, tmp_path / "late", quiet=True)


def test_the_dense_run_is_read_at_the_first_start_only(started, dense_run) -> None:
    """What has a checkpoint of its own is resumed, wherever the dense run is by now."""
    hidden = dense_run[0].with_name("hidden")
    dense_run[0].rename(hidden)
    try:
        config = from_dense(dense_run[0], steps=6)
        assert train(config, started, quiet=True)["step"] == 6
        with pytest.raises(ValueError, match="holds no run: there is no config.json"):
            train(config, started.with_name("other"), quiet=True)
        assert not started.with_name("other").exists()
    finally:
        hidden.rename(dense_run[0])


def test_a_run_from_before_these_keys_goes_on(dense_run) -> None:
    path = dense_run[0] / "config.json"
    text = path.read_text()
    older = json.loads(text)
    del older["train"]["upcycle"], older["train"]["upcycle_step"]
    path.write_text(json.dumps(older))
    try:
        check_claim(dense_run[0], DENSE)
        with pytest.raises(ValueError, match="train.upcycle=, this one has train.upcycle=x"):
            check_claim(dense_run[0], dataclasses.replace(
                DENSE, train=dataclasses.replace(DENSE.train, upcycle="x")
            ))  # fmt: skip
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"model__layers": 4}, {}, "dense model has layers=4, this one 2"),
        ({"model__dim": 16}, {}, "dense model has dim=16, this one 8"),
        ({"model__ffn": 16}, {}, "dense model has ffn=16, this one 12"),
        ({"model__activation": "relu"}, {}, "has activation=relu, this one swiglu"),
        ({"model__kv_heads": 1}, {}, "has key_value_heads=1, this one 2"),
        ({"data__tokenizer": "bpe:300"}, {}, "reads data.tokenizer=bpe:300, this one bytes"),
        ({}, {"moe__experts": 0}, "makes experts, this config has moe.experts=0"),
        ({"moe__experts": 4}, {}, "layer 0 .* has no dense feed-forward network but 4 experts"),
        ({}, {"moe__ffn": 5}, "moe.ffn=5 is no share of the dense model.ffn=12"),
        ({}, {"moe__ffn": 24}, "moe.ffn=24 is no share of the dense model.ffn=12"),
        ({}, {"moe__shared": 1}, "moe.shared=1 of width 12 leave nothing"),
        ({}, {"moe__ffn": 4}, "moe.experts=4 is not divisible by the 3 shards of width 4"),
    ],
)
def test_what_does_not_fit_is_refused(old, new, message: str) -> None:
    old = tiny_config(**{"moe__experts": 0, **old})
    with pytest.raises(ValueError, match=message) as caught:
        check_upcycle(old, tiny_config(**new))
    assert "\n" not in str(caught.value)


def test_another_vocabulary_is_refused() -> None:
    old, new = tiny_config(moe__experts=0), tiny_config()
    dense, fresh = params_of(old), params_of(new)
    fresh["embed_VD"] = jnp.zeros((VOCAB + 1, 8))
    message = rf"embed_VD would have shape \({VOCAB}, 8\), this model has \({VOCAB + 1}, 8\)"
    with pytest.raises(ValueError, match=message):
        upcycle(dense, fresh, old, new)


def test_the_state_of_another_optimizer_is_not_carried() -> None:
    new = from_dense("x", upcycle_optimizer=True)
    factored = dataclasses.replace(
        DENSE, optimizer=dataclasses.replace(DENSE.optimizer, name="adafactor")
    )
    with pytest.raises(ValueError, match="state of adamw only: .*=adafactor, this one adamw"):
        check_upcycle(factored, new)
    with pytest.raises(ValueError, match="train.upcycle_optimizer needs train.upcycle"):
        tiny.tiny(train={"upcycle_optimizer": True})
