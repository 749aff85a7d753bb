"""Experts spread over devices: the outputs, gradients and statistics of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig
from moejax.dispatch import Experts
from moejax.moe import MoeOptions, MoeParams, moe
from moejax.routing import ROUTERS, LayerSize, make_router
from moejax.sharding import BATCH_AXES, SHARDINGS, make_mesh

ROWS, LENGTH, DIM, FFN, EXPERTS = 8, 6, 8, 12, 8
RANDOM = np.random.default_rng(0)
MESHES = {
    "expert=8": MeshConfig(data=1, expert=8),
    "data=2 expert=4": MeshConfig(data=2, expert=4),
    "expert=4 tensor=2": MeshConfig(data=1, expert=4, tensor=2),
    "fsdp=2 expert=2 tensor=2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "data=2 fsdp=2": MeshConfig(data=2, fsdp=2),
}
CASES = {
    # router, options, dispatch, capacity factor, groups
    "switch": ("switch", {}, "gather", 1.0, "sequence"),
    "gshard in the batch": ("gshard_top2", {"second": "always"}, "gather", 1.0, "batch"),
    "top-3": ("topk", {"k": 3}, "dropless", None, "batch"),
    "top-2 with a capacity": ("topk", {"k": 2}, "dropless", 0.75, "batch"),
    "loss-free": ("loss_free", {"k": 2}, "dropless", None, "sequence"),
    "expert choice": ("expert_choice", {"k": 2}, "gather", None, "batch"),
    "expert choice dropless": ("expert_choice", {"k": 2}, "dropless", None, "position"),
    "einsum": ("topk", {"k": 2}, "einsum", 1.0, "sequence"),
}
COVERED = {router for router, *_ in CASES.values()}
EVERY = [name for name in ROUTERS if name not in COVERED]
CASES |= {name: (name, {}, "dropless", None, "batch") for name in EVERY}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


PARAMS = MoeParams(
    normal(DIM, EXPERTS),
    Experts(normal(EXPERTS, DIM, FFN), normal(EXPERTS, FFN, DIM), normal(EXPERTS, DIM, FFN)),
)
X_BSD = normal(ROWS, LENGTH, DIM).at[..., 0].set(1.0)  # a feature that makes all crowd at expert 1
COTANGENT_BSD = normal(ROWS, LENGTH, DIM)
VALID_BS = jnp.asarray(RANDOM.random((ROWS, LENGTH)) < 0.8)
VOCAB = 16
TOKEN_BS = jnp.asarray(RANDOM.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)


def params(name: str) -> MoeParams:
    columns = make_router(*CASES[name][:2]).columns(EXPERTS)
    if not columns:
        return PARAMS
    extra_DX = np.random.default_rng(1).normal(size=(DIM, columns)) / DIM
    return PARAMS._replace(w_extra_DX=jnp.asarray(extra_DX, jnp.float32))


@functools.cache
def compiled_layer(name: str, mesh: MeshConfig):
    """The compiled layer with its gradients, and how its weights and tokens lie."""
    router, options, dispatch, factor, groups = CASES[name]
    made = make_router(router, options)
    layer = MoeOptions(made, dispatch, "swiglu", factor, groups)
    state = made.init(LayerSize(EXPERTS, DIM, VOCAB, jnp.arange(1.0, VOCAB + 1)))
    size = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    grid = make_mesh(mesh, jax.devices()[:size])

    def run(p: MoeParams, x_BSD: jax.Array, valid_BS: jax.Array):
        def loss(p: MoeParams, x_BSD: jax.Array):
            y_BSD, stats = moe(
                *(p, x_BSD),
                options=layer,
                valid_BS=valid_BS,
                token_BS=TOKEN_BS,
                key=jax.random.key(0),
                state=state,
            )
            return (y_BSD * COTANGENT_BSD).sum(), (y_BSD, stats)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(p, x_BSD)

    tokens = NamedSharding(grid, P(BATCH_AXES))
    weights = (NamedSharding(grid, SHARDINGS[w]) for w in ("w_in_EDF", "w_out_EFD", "w_gate_EDF"))
    p, whole = params(name), NamedSharding(grid, P())
    extra = None if p.w_extra_DX is None else whole
    where = (MoeParams(whole, Experts(*weights), extra), tokens, tokens)
    jitted = jax.jit(run)
    with jax.set_mesh(grid):
        arguments = jax.device_put((p, X_BSD, VALID_BS), where)
        return jitted.lower(*arguments).compile(), where


@functools.cache
def result(name: str, mesh: MeshConfig, crowd: float):
    compiled, where = compiled_layer(name, mesh)
    p = params(name)._replace(w_router_DE=PARAMS.w_router_DE.at[0, 1].add(crowd))
    return jax.device_get(compiled(*jax.device_put((p, X_BSD, VALID_BS), where)))


# One case of each dispatch on all meshes, the others of the list on two, all other routers on one.
PAIRS = [
    (name, mesh)
    for name in CASES
    for mesh in MESHES
    if name in ("switch", "top-3")
    or mesh == "fsdp=2 expert=2 tensor=2"
    or (mesh == "expert=8" and name not in EVERY)
]


@pytest.mark.parametrize(("name", "mesh"), PAIRS)
def test_the_same_as_on_one_device(name: str, mesh: str) -> None:
    for crowd in (0.0, 5.0):
        want = result(name, MeshConfig(data=1), crowd)
        got = result(name, MESHES[mesh], crowd)
        close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
        jax.tree.map(close, got, want)
        _, (y_BSD, stats) = got
        assert np.abs(y_BSD).max() > 0.1
        if CASES[name][3] is not None and crowd:
            assert int(stats.load_E.sum()) > int(stats.kept_E.sum())  # something dropped


def exchanges(name: str, *kinds: str) -> list[str]:
    """The collectives of these kinds that move rows of floats over the expert axis."""
    text = compiled_layer(name, MESHES["expert=8"])[0].as_text()
    found = [re.search(rf" = .*f32.* ({'|'.join(kinds)})\(", line) for line in text.splitlines()]
    return [match.group(1) for match in found if match]


def test_two_all_to_alls_forward_and_two_backward() -> None:
    assert exchanges("switch", "all-to-all") == ["all-to-all"] * 4
    # A CPU has no ragged all-to-all: forward it is an all-gather of rows, backward its transpose.
    assert exchanges("top-3", "reduce-scatter") == ["reduce-scatter"] * 2
    assert exchanges("top-3", "all-to-all") == []


def test_experts_that_do_not_divide() -> None:
    grid = make_mesh(MeshConfig(data=1, expert=3), jax.devices()[:3])
    layer = MoeOptions(make_router("topk"), "gather", "swiglu", 1.0)
    with (
        jax.set_mesh(grid),
        pytest.raises(ValueError, match="8 experts are not divisible by mesh axis expert=3"),
    ):
        jax.eval_shape(
            lambda p, x: moe(p, x, options=layer, valid_BS=jnp.ones((6, LENGTH), bool)),
            PARAMS,
            X_BSD[:6],
        )
