"""Three ways to move tokens, one result: each equals the dense oracle, values and gradients."""

import functools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from moejax.dispatch import DISPATCH, Experts, make_plan, num_groups, route
from moejax.moe import MoeOptions, MoeParams, moe, router_input
from moejax.reference import dense_moe, plan_TE
from moejax.routing import ROUTERS, LayerSize, Routing, make_router
from tests.dispatch.plans import plan_with
from tests.oracle import case, check

DIM, FFN, VOCAB = 8, 12, 16


def layer(num_experts: int, gated: bool, dtype: str, seed: int = 0) -> MoeParams:
    """Random weights of one layer; the router's in float32, the experts' in the compute dtype."""
    random = np.random.default_rng(seed)
    shapes = [(num_experts, DIM, FFN), (num_experts, FFN, DIM), (num_experts, DIM, FFN)]
    w_in, w_out, w_gate = (jnp.asarray(random.normal(size=s) / 3, dtype) for s in shapes)
    experts = Experts(w_in, w_out, w_gate if gated else None)
    return MoeParams(jnp.asarray(random.normal(size=(DIM, num_experts)), jnp.float32), experts)


# How the tokens look. The first feature is 1, so the router's first row is a bias per expert.
LOGITS = ("random", "tied", "one_expert", "empty_expert")
VALID = ("all", "some", "none")


def batch(
    p: MoeParams, shape: tuple[int, int], dtype: str, seed: int, logits: str, valid: str
) -> tuple[MoeParams, jax.Array, jax.Array]:
    """Weights and tokens with the wanted peculiarity, and which tokens are real."""
    random = np.random.default_rng(seed)
    x_BSD = random.normal(size=(*shape, DIM))
    x_BSD[..., 0] = 1.0
    w_DE = np.array(p.w_router_DE)
    expert = int(random.integers(w_DE.shape[1]))
    if logits == "tied":
        w_DE[:] = 0.0
    elif logits == "one_expert":
        w_DE[0, expert] += 30.0
    elif logits == "empty_expert":
        w_DE[0, expert] -= 30.0
    share = {"all": 1.1, "some": 0.7, "none": -1.0}[valid]
    valid_BS = jnp.asarray(random.random(shape) < share)
    return p._replace(w_router_DE=jnp.asarray(w_DE)), jnp.asarray(x_BSD, dtype), valid_BS


class Case:
    """One static configuration: its router, and the compiled comparison of all ways to run it."""

    def __init__(
        self,
        router: str,
        options: dict[str, Any],
        groups: str,
        factor: float | None,
        shape: tuple[int, int],
        num_experts: int,
        activation: str = "swiglu",
        dtype: str = "float32",
    ) -> None:
        self.router = make_router(router, options)
        self.groups, self.factor, self.shape, self.dtype = groups, factor, shape, dtype
        self.num_experts, self.activation = num_experts, activation
        self.params = layer(num_experts, activation == "swiglu", dtype)
        random = np.random.default_rng(7)
        columns = self.router.columns(num_experts)
        if columns:
            extra_DX = jnp.asarray(random.normal(size=(DIM, columns)) / 8, jnp.float32)
            self.params = self.params._replace(w_extra_DX=extra_DX)
        # Not as it starts, so that loss_free's bias takes part.
        self.state = jax.tree.map(
            lambda a: a + random.normal(size=a.shape, scale=0.1).astype(a.dtype),
            self.router.init(LayerSize(num_experts, DIM, VOCAB)),
        )
        self.token_BS = jnp.asarray(random.integers(0, VOCAB, shape))
        self.cotangent_BSD = np.random.default_rng(3).normal(size=(*shape, DIM)).astype(np.float32)
        self.compare = jax.jit(self._compare)

    def options(self, dispatch: str) -> MoeOptions:
        return MoeOptions(self.router, dispatch, self.activation, self.factor, self.groups)

    def dense(
        self, p: MoeParams, x_BSD: jax.Array, valid_BS: jax.Array, key: jax.Array
    ) -> jax.Array:
        """The same layer through the dense oracle: every expert on every token."""
        x_TD = x_BSD.reshape(-1, DIM)
        r = router_input(p, x_TD, valid_BS, self.token_BS, key, self.state, 0.0)
        routing = route(self.router.route, r, self.shape[0], self.groups)
        plan = make_plan(routing, self.factor, num_groups(*x_BSD.shape[:2], self.groups))
        weight_TE = plan_TE(plan, x_TD.shape[0], self.num_experts)
        y_TD = dense_moe(p.experts, x_TD, weight_TE, self.activation)
        if routing.rest_TD is not None:
            y_TD = y_TD + routing.rest_TD
        return y_TD.reshape(x_BSD.shape)

    def _compare(self, p: MoeParams, x_BSD: jax.Array, valid_BS: jax.Array, key: jax.Array) -> Any:
        """name -> (y, gradients of a random projection of y by the weights and by x)."""

        def run(name: str, p: MoeParams, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
            if name == "dense":
                y_BSD = self.dense(p, x_BSD, valid_BS, key)
            else:
                options = self.options(name)
                y_BSD, _ = moe(
                    p,
                    x_BSD,
                    options=options,
                    valid_BS=valid_BS,
                    token_BS=self.token_BS,
                    key=key,
                    state=self.state,
                )
            return (y_BSD.astype(jnp.float32) * self.cotangent_BSD).sum(), y_BSD

        gradient = jax.grad(run, argnums=(1, 2), has_aux=True)
        return {name: gradient(name, p, x_BSD) for name in ("dense", *DISPATCH)}


# Every router, every group, every kind of capacity; shapes that divide and shapes that do not.
CASES = {
    "switch": ("switch", {}, "batch", 1.0, (2, 8), 4, "relu"),
    "switch_sequence": ("switch", {}, "sequence", 0.5, (3, 7), 5, "gelu"),
    "topk": ("topk", {"k": 3}, "batch", None, (3, 16), 8, "swiglu"),
    "topk_renorm": ("topk", {"k": 2, "renormalise": True}, "batch", 1.25, (3, 5), 8, "swiglu"),
    "topk_token": ("topk", {"k": 2, "order": "token_major"}, "sequence", 1.0, (2, 8), 4, "relu"),
    "topk_position": ("topk", {"k": 2}, "position", 0.6, (5, 4), 3, "gelu"),
    "topk_all": ("topk", {"k": 4}, "batch", 0.7, (2, 6), 4, "relu"),
    "gshard": ("gshard_top2", {}, "batch", 1.0, (2, 8), 4, "relu"),
    "gshard_always": ("gshard_top2", {"second": "always"}, "sequence", 0.5, (2, 9), 6, "swiglu"),
    "expert_choice": ("expert_choice", {"k": 2}, "batch", None, (2, 8), 4, "swiglu"),
    "expert_choice_position": ("expert_choice", {"k": 2}, "position", None, (5, 3), 3, "relu"),
    "expert_choice_cut": ("expert_choice", {"k": 2}, "sequence", 0.5, (2, 8), 4, "relu"),
    "loss_free": ("loss_free", {"k": 2}, "batch", 1.25, (3, 8), 8, "swiglu"),
    "loss_free_renorm": (
        "loss_free",
        {"k": 3, "renormalise": True},
        "sequence",
        None,
        (2, 8),
        4,
        "relu",
    ),
    "hash": ("hash", {}, "batch", 1.0, (3, 8), 4, "relu"),
    "quantile": ("quantile_balancing", {"k": 2}, "sequence", 1.25, (3, 8), 8, "swiglu"),
    "deepseek_moe": (
        "deepseek_moe",
        {"k": 3, "expert_groups": 4},
        "batch",
        None,
        (2, 8),
        8,
        "relu",
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {"k": 2, "expert_groups": 4, "top_groups": 2, "route_scale": 4.0},
        "sequence",
        1.0,
        (2, 8),
        8,
        "swiglu",
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {"k": 4, "expert_groups": 3, "top_groups": 2},
        "batch",
        0.7,
        (3, 6),
        9,
        "relu",
    ),
    "top_p": ("top_p", {"k": 3, "p": 0.6}, "batch", 0.5, (2, 8), 4, "swiglu"),
    "topk_bpr": ("topk", {"k": 2, "order": "bpr"}, "sequence", 0.5, (3, 8), 4, "relu"),
    "noisy_topk": ("noisy_topk", {"k": 2}, "batch", 1.0, (2, 8), 4, "swiglu"),
    "hierarchical": (
        "hierarchical",
        {"k": 4, "expert_groups": 3},
        "sequence",
        1.0,
        (2, 8),
        9,
        "relu",
    ),
    "vmoe_bpr": ("vmoe", {"k": 2, "order": "bpr"}, "batch", 0.5, (2, 8), 4, "gelu"),
    "remoe": ("remoe", {}, "batch", None, (2, 8), 4, "swiglu"),
    "remoe_sequence": ("remoe", {"order": "k_major"}, "sequence", 0.3, (2, 8), 5, "relu"),
    "base": ("base", {}, "sequence", None, (2, 8), 4, "swiglu"),
    "sinkhorn": ("sinkhorn", {"k": 2}, "batch", 1.0, (3, 5), 4, "relu"),
    "token_rounding": ("token_rounding", {"tile": 3}, "batch", None, (2, 8), 4, "swiglu"),
    "capped": ("expert_choice_capped", {"most": 2}, "batch", None, (2, 8), 4, "relu"),
    "sparsemixer2": ("sparsemixer2", {"epsilon": 0.5}, "batch", 1.0, (2, 8), 4, "swiglu"),
    "densemixer": ("densemixer", {}, "batch", None, (3, 5), 4, "swiglu"),
    "densemixer_renorm": (
        "densemixer",
        {"renormalise": True},
        "sequence",
        0.7,
        (2, 8),
        5,
        "relu",
    ),
    "default_moe": ("default_moe", {}, "sequence", 1.0, (2, 8), 4, "swiglu"),
    "dselect_k": ("dselect_k", {}, "batch", None, (2, 8), 5, "swiglu"),
    "replay": (
        "replay",
        {"k": 3, "weight": "softmax_renorm", "order": "token_major"},
        "sequence",
        0.7,
        (2, 8),
        4,
        "swiglu",
    ),
}


# Routers that look at other projections, or at token ids.
NO_LOGITS = ("dselect_k", "hash_router")


@functools.cache
def cased(name: str, dtype: str = "float32") -> Case:
    return Case(*CASES[name], dtype=dtype)


def agree(got: Any, want: Any, tolerance: float) -> None:
    """Same trees to `tolerance` of the largest entry of each array."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        limit = tolerance * max(np.abs(b).max(), 1e-2)
        assert np.abs(a - b).max() <= limit, f"{jax.tree_util.keystr(path)}: {np.abs(a - b).max()}"


def test_every_router_is_compared() -> None:
    assert {name for name, *_ in CASES.values()} == set(ROUTERS)


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 10**6), logits=st.sampled_from(LOGITS), valid=st.sampled_from(VALID))
def test_dispatches_equal_the_dense_oracle(name: str, seed: int, logits: str, valid: str) -> None:
    found = cased(name)
    p, x_BSD, valid_BS = batch(found.params, found.shape, "float32", seed, logits, valid)
    results = found.compare(p, x_BSD, valid_BS, jax.random.key(seed))
    for dispatch in DISPATCH:
        agree(results[dispatch], results["dense"], 1e-5)
    y_BSD = results["dense"][1]
    assert not np.any(np.asarray(y_BSD)[~np.asarray(valid_BS)])  # no expert works on padding


@pytest.mark.parametrize("name", CASES)
def test_the_comparison_reaches_every_weight(name: str) -> None:
    found = cased(name)
    p, x_BSD, valid_BS = batch(found.params, found.shape, "float32", 0, "random", "all")
    (p_grad, x_grad), y_BSD = found.compare(p, x_BSD, valid_BS, jax.random.key(0))["dense"]
    if found.router.spec.route.__name__ in NO_LOGITS:
        assert not np.any(p_grad.w_router_DE)
        p_grad = p_grad._replace(w_router_DE=None)
    for a in jax.tree.leaves((p_grad, x_grad, y_BSD)):
        assert np.abs(a).max() > 1e-3


@pytest.mark.parametrize("name", ["topk_renorm", "expert_choice"])
def test_dispatches_equal_the_dense_oracle_in_bfloat16(name: str) -> None:
    found = cased(name, "bfloat16")
    p, x_BSD, valid_BS = batch(found.params, found.shape, "bfloat16", 1, "random", "some")
    results = found.compare(p, x_BSD, valid_BS, jax.random.key(1))
    for dispatch in DISPATCH:
        assert results[dispatch][1].dtype == jnp.bfloat16
        agree(results[dispatch], results["dense"], 0.03)


@pytest.mark.parametrize("name", ["topk_renorm", "topk_position"])
def test_a_buffer_without_its_free_slots_is_the_same(name: str, monkeypatch) -> None:
    """As for large buffers on a CPU: the rows behind the last that an expert got are left out."""
    monkeypatch.setattr("moejax.dispatch.experts.LARGE_BUFFER", 1)
    found = Case(*CASES[name])
    for seed, logits in enumerate(("random", "one_expert")):
        p, x_BSD, valid_BS = batch(found.params, found.shape, "float32", seed, logits, "some")
        results = found.compare(p, x_BSD, valid_BS, jax.random.key(seed))
        agree(results["gather"], results["dense"], 1e-5)


IDENTITY = Experts(jnp.stack([jnp.eye(4)] * 2), jnp.stack([jnp.eye(4)] * 2))


def test_vmoe_buffers_with_experts_that_return_their_input() -> None:
    found = case("dispatch/vmoe_dispatch_E2C2")
    x_TD = jnp.asarray(found["inputs"]["x_GTD"], jnp.float32).reshape(6, 4)
    # Four assignments a group; listed by slot, which makes the slots their places in the queues.
    rows = sorted(found["inputs"]["kept"], key=lambda row: (row[0], row[3]))
    group_N, token_N, expert_N, slot_N, weight_N = (np.array(a) for a in zip(*rows, strict=True))
    routing = Routing(
        jnp.asarray(group_N * 3 + token_N),
        jnp.asarray(expert_N),
        jnp.asarray(weight_N, jnp.float32),
        jnp.zeros(8, jnp.int32),
        jnp.zeros((6, 2)),
    )
    plan = plan_with(routing, found["inputs"]["C"], groups=2)
    np.testing.assert_array_equal(plan.slot_N, 2 * group_N + slot_N)
    for dispatch in DISPATCH.values():
        y_TD, _ = dispatch(IDENTITY, x_TD, plan, "relu")  # relu changes no positive payload
        check(found, "combined_GTD", y_TD.reshape(2, 3, 4))
    buffer_ENd = np.zeros((2, plan.slots, 4))
    buffer_ENd[plan.expert_N, plan.slot_N] = x_TD[plan.token_N]
    check(found, "dispatched_ENd", buffer_ENd)
