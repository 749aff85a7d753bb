"""One optimizer step: the same however the batch is cut and wherever it lies; what enters the
loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.config import MeshConfig
from moejax.sharding import BATCH_AXES, SHARDINGS, batch_sharding, make_mesh
from moejax.training.state import TrainState, init_state, make_graph, shardings
from moejax.training.step import loss_fn, train_step
from tests import tiny

BIAS_RATE = tiny.LOSS_FREE["bias_rate"]


def first_state(config, optimizer):
    """A state whose router state is not zero, so that a step that ignores it shows."""
    init = functools.partial(
        init_state, config=config, vocab_size=tiny.VOCABULARY, optimizer=optimizer
    )
    state = jax.jit(init)(7)
    if state.router_state is not None:
        bias_LE = np.random.default_rng(0).normal(0, 0.1, state.router_state.shape)
        state = state._replace(router_state=jnp.asarray(bias_LE, jnp.float32))
    return jax.device_get(state)


@functools.cache
def start_of(arm):
    return first_state(tiny.tiny(**tiny.ARMS[arm]), optax.sgd(1.0))


ONE_DEVICE = MeshConfig(data=1)


@functools.cache
def stepped(arm, mesh=ONE_DEVICE, accumulation=1):
    """State before, state after, metrics. Plain gradient descent with rate 1: the update is
    -gradient."""
    before, count = start_of(arm), mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    grid = make_mesh(mesh, jax.devices()[:count])
    where = shardings(before, grid)
    run = compiled_step(arm, accumulation, grid)
    batch = jax.device_put(sturdy_batch(arm), batch_sharding(grid))
    after, metrics = run(jax.device_put(before, where), batch)
    shards = jax.tree.map(lambda a: {s.data.shape for s in a.addressable_shards}, after.params)
    return before, jax.device_get(after), jax.device_get(metrics), shards


@functools.cache
def compiled_step(arm, accumulation, grid):
    config = tiny.tiny(**{**tiny.ARMS[arm], "train": {"accumulation": accumulation}})
    graph = make_graph(config, tiny.VOCABULARY)
    step = functools.partial(train_step, graph=graph, config=config, optimizer=optax.sgd(1.0))
    where = shardings(start_of(arm), grid)
    jitted = jax.jit(step, out_shardings=(where, None))

    def run(state, batch):
        with jax.set_mesh(grid):
            return jitted(state, batch)

    return run


@functools.cache
def sturdy_batch(arm):
    """A batch whose routing no rounding error changes: a row that begins with two equal bytes, say,
    has two equal tokens, and which of them an expert takes is chance."""
    before, grid = start_of(arm), make_mesh(ONE_DEVICE, jax.devices()[:1])
    run, random = compiled_step(arm, 1, grid), np.random.default_rng(0)

    def nearby(a):
        return (a * (1 + 1e-6 * random.normal(size=a.shape))).astype(np.float32)

    others = [before._replace(params=jax.tree.map(nearby, before.params)) for _ in range(4)]
    for seed in range(16):
        batch = tiny.dataset().train_batch(0, seed=seed)
        norms = [float(run(state, batch)[1]["grad_norm"]) for state in (before, *others)]
        if np.allclose(norms, norms[0], rtol=2e-5):
            return batch
    raise AssertionError("each of 16 batches has a tie between experts or tokens")


def assert_same_step(ours, theirs):
    """Loss, balance losses, routing figures, gradients and router state, to float tolerance."""
    (before, after, metrics, _), (_, reference, expected, _) = ours, theirs
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    jax.tree.map(close, metrics, expected)
    jax.tree.map(close, after.params, reference.params)
    if before.router_state is not None:  # signs: exactly
        tiny.assert_identical(after.router_state, reference.router_state)
    assert (int(after.step), int(after.position)) == (1, 8)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params, after.params)
    assert all(float(x) > 0 for x in jax.tree.leaves(moved)), moved


@pytest.mark.parametrize(("arm", "parts"), [("switch", 4), ("loss_free", 2), ("loss_free", 4)])
def test_accumulation_changes_nothing(arm, parts):
    assert_same_step(stepped(arm, accumulation=parts), stepped(arm))


FULL = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
MESHES = [
    ("loss_free", MeshConfig(data=8)),
    ("switch", MeshConfig(data=2, fsdp=2, expert=2)),
    *((arm, FULL) for arm in tiny.ARMS if arm != "gshard"),  # which is as switch
]


@pytest.mark.parametrize(("arm", "mesh"), MESHES, ids=str)
def test_a_step_on_a_mesh_is_the_step_on_one_device(arm, mesh):
    assert_same_step(stepped(arm, mesh), stepped(arm))


def keys(path):
    return jax.tree_util.keystr(path)


@pytest.mark.parametrize("arm", [arm for arm, mesh in MESHES if mesh is FULL])
def test_arrays_lie_on_the_mesh_as_the_table_says(arm):
    _, after, _, shards = stepped(arm, FULL)
    sizes = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    assert SHARDINGS["batch_B"] == jax.P(BATCH_AXES)
    lies = {
        keys(path): shapes
        for path, shapes in jax.tree.leaves_with_path(shards, is_leaf=lambda x: isinstance(x, set))
    }
    for path, leaf in jax.tree.leaves_with_path(after.params):
        name = path[-1].key
        rule = SHARDINGS[name]
        stacked = leaf.ndim - len(name.rpartition("_")[2])
        parts = [1] * stacked + [sizes.get(axis, 1) for axis in rule]
        parts += [1] * (leaf.ndim - len(parts))
        expected = tuple(n // part for n, part in zip(leaf.shape, parts, strict=True))
        assert lies[keys(path)] == {expected}, name


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_bias_moves_once_a_step_towards_the_idle_experts(parts):
    """Wang et al. 2024, algorithm 1: b += u sign(mean load - load), of the whole batch."""
    before, after, metrics, _ = stepped("loss_free", accumulation=parts)
    idle_LE = np.sign(0.25 - metrics["load_LE"])
    assert set(np.unique(idle_LE)) >= {-1.0, 1.0}
    expected_LE = before.router_state + np.float32(BIAS_RATE) * idle_LE.astype(np.float32)
    np.testing.assert_allclose(after.router_state, expected_LE, rtol=0, atol=1e-8)


def test_routers_without_a_state_carry_none():
    assert stepped("switch")[1].router_state is None
    assert stepped("dense")[1].router_state is None


@pytest.fixture(scope="module")
def loss_of():
    """(weights, parameters, router bias) -> loss and aux, of one program for each set of
    weights."""
    batch = tiny.dataset().train_batch(0, seed=0)

    @functools.cache
    def compiled(weights):
        config = tiny.tiny(router=tiny.LOSS_FREE, balance=dict(weights))
        call = functools.partial(loss_fn, graph=make_graph(config, tiny.VOCABULARY), config=config)
        return jax.jit(call)

    def call(weights, params, bias_LE):
        key = jax.random.key(0)
        return jax.device_get(compiled(tuple(weights.items()))(params, bias_LE, batch, key))

    return call


@pytest.fixture(scope="module")
def state() -> TrainState:
    return jax.tree.map(jnp.asarray, start_of("loss_free"))


def test_balance_losses_enter_the_loss_with_their_weight(loss_of, state):
    plain, plain_aux = loss_of({}, state.params, state.router_state)
    total, aux = loss_of({"load_balance": 0.5, "router_z": 0.25}, state.params, state.router_state)
    assert plain == plain_aux["loss"] == pytest.approx(aux["loss"], rel=1e-6)
    assert plain_aux["balance"] == {}
    stats = aux["stats"]
    share_LE = stats.load_E / stats.load_E.sum(-1, keepdims=True)
    prob_LE = stats.prob_E / stats.tokens[:, None]
    load_balance = (4 * (share_LE * prob_LE).sum(-1)).mean()
    router_z = (stats.z / stats.tokens).mean()
    assert aux["balance"]["load_balance"] == pytest.approx(load_balance, rel=1e-5)
    assert aux["balance"]["router_z"] == pytest.approx(router_z, rel=1e-5)
    assert total - aux["loss"] == pytest.approx(0.5 * load_balance + 0.25 * router_z, rel=1e-4)


def test_the_routers_bias_is_read_by_the_forward_pass(loss_of, state):
    """A bias of 10 on experts 1 and 3 beats any sigmoid: they get all."""
    bias_LE = jnp.tile(jnp.array([0.0, 10.0, 0.0, 10.0]), (2, 1))
    _, aux = loss_of({}, state.params, bias_LE)
    np.testing.assert_array_equal(aux["load_LE"], np.tile([0.0, 0.5, 0.0, 0.5], (2, 1)))


def test_the_gradient_of_the_weighted_losses_reaches_the_router(state):
    """Central differences along the gradient itself; a weight of 3 lets the balance losses
    dominate."""
    config = tiny.tiny(router=tiny.LOSS_FREE, balance={"load_balance": 3.0, "router_z": 3.0})
    key = jax.random.key(0)
    batch = jax.tree.map(jnp.asarray, tiny.dataset().train_batch(0, seed=0))
    graph = make_graph(config, tiny.VOCABULARY)

    def loss(w_router_LDE):
        params = jax.tree.map_with_path(
            lambda path, a: w_router_LDE if path[-1].key == "w_router_DE" else a, state.params
        )
        total, aux = loss_fn(params, state.router_state, batch, key, graph, config)
        return total, aux["loss"]

    (w_router_LDE,) = (
        leaf
        for path, leaf in jax.tree.leaves_with_path(state.params)
        if path[-1].key == "w_router_DE"
    )
    value = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, plain), grad_LDE = value(jnp.asarray(w_router_LDE))
    assert total - plain > 3.0  # load_balance is at least about 1
    h = 3e-4 / float(jnp.linalg.norm(grad_LDE))  # small: a changed choice is a jump
    (above, _), _ = value(w_router_LDE + h * grad_LDE)
    (below, _), _ = value(w_router_LDE - h * grad_LDE)
    slope = (above - below) / (2 * h)
    assert slope == pytest.approx(float(jnp.sum(grad_LDE**2)), rel=0.03)
