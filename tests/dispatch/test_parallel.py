"""Experts spread over devices: the outputs, gradients and statistics of one device."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig
from moejax.dispatch import Experts, Shared, parallel
from moejax.moe import MoeOptions, MoeParams, moe
from moejax.planning.collectives import between_devices
from moejax.routing import (
    ROUTERS,
    LayerSize,
    RouterInput,
    RouterSpec,
    Routing,
    make_router,
    token_choice,
)
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


def best_of_the_batch(r: RouterInput) -> Routing:
    """A user's own router, whose tokens do not choose alone: they look at the batch's mean."""
    scores_TE = jax.nn.softmax(r.logits_TE - r.logits_TE.mean(0)[None])
    weight_TK, expert_TK = jax.lax.top_k(scores_TE, 2)
    return token_choice(r, expert_TK, weight_TK, scores_TE)


def best(r: RouterInput) -> Routing:
    """A user's own router, whose tokens choose alone: its spec says so."""
    scores_TE = jax.nn.sigmoid(r.logits_TE)
    weight_TK, expert_TK = jax.lax.top_k(scores_TE, 2)
    return token_choice(r, expert_TK, weight_TK, scores_TE)


COVERED = {router for router, *_ in CASES.values()}
EVERY = [name for name in ROUTERS if name not in COVERED]
# With a capacity that binds across devices: who is first is decided in the whole batch.
CASES |= {name: (name, {}, "dropless", 0.75, "batch") for name in EVERY}
CASES |= {
    "token-major": ("topk", {"order": "token_major"}, "gather", 0.75, "batch"),
    "batch priority": ("topk", {"order": "bpr"}, "gather", 0.75, "batch"),
    "noise in sequences": ("gshard_top2", {}, "gather", 0.75, "sequence"),
    "a function": (best_of_the_batch, {}, "dropless", 0.75, "batch"),
    "a spec": (RouterSpec(best, "token"), {}, "dropless", None, "batch"),
}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


PARAMS = MoeParams(
    normal(DIM, EXPERTS),
    Experts(normal(EXPERTS, DIM, FFN), normal(EXPERTS, FFN, DIM), normal(EXPERTS, DIM, FFN)),
)
SHARED = Shared(normal(DIM, FFN), normal(FFN, DIM), normal(DIM, FFN))
WITH_SHARED = {"einsum", "loss-free", "noise in sequences"}  # one of each dispatch
X_BSD = normal(ROWS, LENGTH, DIM).at[..., 0].set(1.0)  # a feature that makes all crowd at expert 1
COTANGENT_BSD = normal(ROWS, LENGTH, DIM)
VALID_BS = jnp.asarray(RANDOM.random((ROWS, LENGTH)) < 0.8)
VOCAB = 16
TOKEN_BS = jnp.asarray(RANDOM.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)


def params(name: str) -> MoeParams:
    columns = make_router(*CASES[name][:2]).columns(EXPERTS)
    if not columns:
        return PARAMS._replace(shared=SHARED if name in WITH_SHARED else None)
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
    beside = (NamedSharding(grid, SHARDINGS[w]) for w in ("w_in_DF", "w_out_FD", "w_gate_DF"))
    shared = None if p.shared is None else Shared(*beside)
    where = (MoeParams(whole, Experts(*weights), extra, shared), tokens, tokens)
    jitted = jax.jit(run)
    with jax.set_mesh(grid):
        arguments = jax.device_put((p, X_BSD, VALID_BS), where)
        return jitted.lower(*arguments).compile(), where


@functools.cache
def result(name: str, mesh: MeshConfig, crowd: float):
    compiled, where = compiled_layer(name, mesh)
    p = params(name)._replace(w_router_DE=PARAMS.w_router_DE.at[0, 1].add(crowd))
    return jax.device_get(compiled(*jax.device_put((p, X_BSD, VALID_BS), where)))


def close(got: np.ndarray, want: np.ndarray) -> None:
    """2e-5; of what is large, where terms cancel, a millionth of the largest entry."""
    largest = np.abs(want).max(initial=0.0)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=max(2e-5, 1e-6 * largest))


# Every expert is listed for every token, or all rows are spread evenly: nothing drops.
NEVER_FULL = {"base", "remoe", "densemixer", "dselect_k"}
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
        jax.tree.map(close, got, want)
        _, (y_BSD, stats) = got
        assert np.abs(y_BSD).max() > 0.1
        if CASES[name][3] is not None and crowd and name not in NEVER_FULL:
            assert int(stats.load_E.sum()) > int(stats.kept_E.sum())  # something dropped


def test_rows_travel_in_lines(monkeypatch) -> None:
    """As wide rows do: the narrow ones of these tests are cut into two lines here."""
    monkeypatch.setattr(parallel, "LINE", DIM // 2)
    compiled, where = compiled_layer.__wrapped__("top-3", MESHES[WIDE])
    got = jax.device_get(compiled(*jax.device_put((params("top-3"), X_BSD, VALID_BS), where)))
    jax.tree.map(close, got, result("top-3", MeshConfig(data=1), 0.0))
    text = compiled.as_text()
    assert re.search(rf"f32\[[\d,]*,2,{DIM // 2}\]\S* all-gather", text)  # which stands in for it


BATCH, WIDE = "data,fsdp,expert", "fsdp=2 expert=2 tensor=2"
# (kind, axis, calls) of the compiled layer with its gradients: those of rows, weights and sums.
SWITCH = {
    # Rows: there and back, forward and backward.
    ("all-to-all", "expert"): 4,
    # Weights: gathered where they are used, their gradients scattered.
    ("all-gather", "fsdp"): 3,
    ("reduce-scatter", "fsdp"): 3,
    # The hidden width's parts: of the output, and of the gradients of input and logits, together.
    ("all-reduce", "tensor"): 2,
    # All statistics together, and the gradient of the router's weights.
    ("all-reduce", "fsdp,expert"): 2,
}


def talk(name: str, mesh: str) -> list[tuple[str, str, int]]:
    """Every collective between devices: kind, axes, bytes."""
    compiled, (_, tokens, _) = compiled_layer(name, MESHES[mesh])
    return [(c.kind, c.axes, c.bytes) for c in between_devices(compiled, tokens.mesh)]


def test_the_budget_of_collectives() -> None:
    found = talk("switch", WIDE)
    assert collections.Counter((kind, axes) for kind, axes, _ in found) == SWITCH
    rows = {size for kind, _, size in found if kind == "all-to-all"}
    # 2 sequences on a device, each with ceil(6 / 8) slots at 8 experts.
    assert rows == {2 * EXPERTS * DIM * 4}
    # Routing is local: nothing is as big as the batch, and a capacity across devices asks for
    # counts only, [devices, choices, experts].
    for name in ("top-3", "top-2 with a capacity", "loss-free"):
        gathered = [size for kind, axes, size in talk(name, "expert=8") if kind == "all-gather"]
        counts = 8 * 2 * EXPERTS * 4
        assert (counts in gathered) == (name == "top-2 with a capacity")
    # A user's router too, if its spec says that tokens choose alone: else logits are gathered.
    logits = ROWS * LENGTH * EXPERTS * 4
    for name, local in (("a spec", True), ("a function", False)):
        gathered = [size for kind, _, size in talk(name, "expert=8") if kind == "all-gather"]
        assert (logits in gathered) != local


def test_a_group_across_devices_has_no_buffers() -> None:
    """They would be as large as the whole group's on each device."""
    sent = [size for kind, _, size in talk("gshard in the batch", "expert=8") if "to-all" in kind]
    assert sent and max(sent) == EXPERTS * 4  # counts: rows travel sorted
    sent = [size for kind, _, size in talk("switch", "expert=8") if "to-all" in kind]
    assert set(sent) == {EXPERTS * DIM * 4}  # one slot for each expert: a sequence's


def test_two_ragged_exchanges_forward_and_two_backward() -> None:
    # A CPU has no ragged all-to-all: forward it is an all-gather of rows, backward its transpose.
    found = [kind for kind, axes, _ in talk("top-3", "expert=8") if axes == "expert"]
    assert found.count("reduce-scatter") == 2


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
