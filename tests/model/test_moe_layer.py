"""One MoE layer: padding, symmetry, sums of statistics, precision, and life in a foreign model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax.config import ModelConfig, MoeConfig, RouterConfig
from moejax.dispatch import Experts, make_plan, route
from moejax.moe import MoeOptions, MoeParams, moe, router_input
from moejax.reference import dense_moe, plan_TE
from moejax.routing import ROUTERS, LayerSize, RouterInput, Routing, make_router, token_choice
from tests.model.tiny import close

ROWS, LENGTH, DIM, FFN, EXPERTS = 2, 6, 8, 12, 4
RANDOM = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape, scale=scale), jnp.float32)


PARAMS = MoeParams(
    normal(DIM, EXPERTS), Experts(normal(EXPERTS, DIM, FFN) / 3, normal(EXPERTS, FFN, DIM) / 3)
)
X_BSD = normal(ROWS, LENGTH, DIM)
EXTRA_DX = jnp.sin(jnp.arange(DIM * 64.0)).reshape(DIM, 64)
VALID_BS = jnp.asarray(RANDOM.random((ROWS, LENGTH)) < 0.7)
ALL_BS = jnp.ones((ROWS, LENGTH), bool)
JITTER = 0.5


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def run(name, factor, groups, jitter, p, x_BSD, valid_BS, key=None):
    router = make_router(name)
    options = MoeOptions(router, "gather", "relu", factor, groups, jitter)
    state = router.init(LayerSize(EXPERTS, DIM, LENGTH))
    columns = router.columns(EXPERTS)
    if columns:
        p = p._replace(w_extra_DX=jnp.sin(jnp.arange(DIM * columns)).reshape(DIM, columns))
    token_BS = jnp.broadcast_to(jnp.arange(LENGTH)[None], valid_BS.shape)
    return moe(
        p, x_BSD, options=options, valid_BS=valid_BS, token_BS=token_BS, key=key, state=state
    )


def tight(name: str) -> float:
    """A capacity factor at which some drop. It counts the k = 4 choices that top_p may make, and
    seldom does."""
    return 0.1 if name == "top_p" else 0.25


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_changes_no_real_token(name: str) -> None:
    junk_BSD = jnp.where(VALID_BS[..., None], X_BSD, normal(ROWS, LENGTH, DIM, scale=100.0))
    one = run(name, tight(name), "sequence", 0.0, PARAMS, X_BSD, VALID_BS)
    two = run(name, tight(name), "sequence", 0.0, PARAMS, junk_BSD, VALID_BS)
    close(two, one)
    assert not np.any(np.asarray(two[0])[~np.asarray(VALID_BS)])


def test_padding_takes_no_slot() -> None:
    # Everybody wants expert 0, which has 12 / 4 = 3 slots. The last three tokens are real.
    p = PARAMS._replace(w_router_DE=jnp.zeros((DIM, EXPERTS)))
    valid_BS = (jnp.arange(12) >= 9).reshape(ROWS, LENGTH)
    _, stats = run("switch", 1.0, "batch", 0.0, p, X_BSD, valid_BS)
    assert stats.kept_E.tolist() == [3, 0, 0, 0] and int(stats.left_behind) == 0
    _, crowded = run("switch", 1.0, "batch", 0.0, p, X_BSD, ALL_BS)
    assert crowded.kept_E.tolist() == [3, 0, 0, 0] and int(crowded.left_behind) == 9


@pytest.mark.parametrize("name", ["topk", "expert_choice"])
def test_order_of_tokens_and_names_of_experts_are_nothing(name: str) -> None:
    y_BSD, stats = run(name, None, "batch", 0.0, PARAMS, X_BSD, ALL_BS)
    order_T = RANDOM.permutation(ROWS * LENGTH)

    def moved(a_BSD: jax.Array) -> jax.Array:
        return a_BSD.reshape(ROWS * LENGTH, -1)[order_T].reshape(ROWS, LENGTH, -1)

    close(run(name, None, "batch", 0.0, PARAMS, moved(X_BSD), ALL_BS)[0], moved(y_BSD))
    order_E = np.array([2, 0, 3, 1])
    p = MoeParams(
        PARAMS.w_router_DE[:, order_E],
        Experts(PARAMS.experts.w_in_EDF[order_E], PARAMS.experts.w_out_EFD[order_E]),
    )
    renamed_BSD, renamed = run(name, None, "batch", 0.0, p, X_BSD, ALL_BS)
    close(renamed_BSD, y_BSD)
    np.testing.assert_array_equal(renamed.load_E, stats.load_E[order_E])


@pytest.mark.parametrize("name", ROUTERS)
def test_statistics_of_two_halves_add_up_to_the_whole(name: str) -> None:
    # Sequences are their own groups: one routes alone as it does in the batch.
    whole = run(name, tight(name), "sequence", 0.0, PARAMS, X_BSD, VALID_BS)
    halves = [
        run(name, tight(name), "sequence", 0.0, PARAMS, X_BSD[b : b + 1], VALID_BS[b : b + 1])
        for b in range(ROWS)
    ]
    close(jnp.concatenate([y_BSD for y_BSD, _ in halves]), whole[0])
    close(jax.tree.map(jnp.add, halves[0][1], halves[1][1]), whole[1])
    assert int(whole[1].dropped_K.sum()) > 0


def test_router_multiplies_in_float32_what_bfloat16_gives_it() -> None:
    x_BSD = X_BSD.astype(jnp.bfloat16)
    layer = moejax.MoE(
        ModelConfig(dim=DIM, heads=1, ffn=FFN, dtype="bfloat16"),
        MoeConfig(EXPERTS),
        rngs=nnx.Rngs(0),
    )
    layer.w_router_DE[...] = PARAMS.w_router_DE
    y_BSD, stats = layer(x_BSD)
    assert y_BSD.dtype == jnp.bfloat16
    logits_TE = np.asarray(x_BSD, np.float64).reshape(-1, DIM) @ np.asarray(
        PARAMS.w_router_DE, np.float64
    )
    best_TE = np.argsort(-logits_TE, axis=-1)[:, :2]
    assert stats.load_E.tolist() == np.bincount(best_TE.reshape(-1), minlength=EXPERTS).tolist()
    # A bfloat16 product is off by some 1e-3.
    z = np.square(np.log(np.exp(logits_TE).sum(-1))).sum()
    assert float(stats.z) == pytest.approx(z, rel=1e-6)
    low = np.asarray((x_BSD.reshape(-1, DIM) @ PARAMS.w_router_DE.astype(jnp.bfloat16)), np.float64)
    assert np.square(np.log(np.exp(low).sum(-1))).sum() != pytest.approx(z, rel=1e-5)


def test_jitter_moves_the_router_and_never_the_experts() -> None:
    key = jax.random.key(0)
    y_BSD, stats = run("topk", None, "batch", JITTER, PARAMS, X_BSD, ALL_BS, key)
    quiet_BSD, quiet = run("topk", None, "batch", JITTER, PARAMS, X_BSD, ALL_BS)
    still_BSD, _ = run("topk", None, "batch", 0.0, PARAMS, X_BSD, ALL_BS, key)
    np.testing.assert_array_equal(quiet_BSD, still_BSD)  # no key, no jitter
    assert np.abs(stats.z - quiet.z) > 1e-3
    x_TD = X_BSD.reshape(-1, DIM)
    r = router_input(PARAMS, x_TD, ALL_BS, None, key, None, JITTER)
    plan = make_plan(route(make_router("topk").route, r, ROWS, "batch"), None)
    weight_TE = plan_TE(plan, ROWS * LENGTH, EXPERTS)
    close(y_BSD.reshape(-1, DIM), dense_moe(PARAMS.experts, x_TD, weight_TE, "relu"))


def test_jitter_is_a_factor_near_one_for_each_feature() -> None:
    # With w = 1 and x = 1 the logits are the factors: uniform in [.5, 1.5], sd 1 / sqrt(12).
    x_TD = jnp.ones((100, 50))
    key = jax.random.key(0)
    noisy = router_input(
        MoeParams(jnp.eye(50), PARAMS.experts),
        x_TD,
        jnp.ones((1, 100), bool),
        None,
        key,
        None,
        JITTER,
    )
    logits_TE = np.asarray(noisy.logits_TE)
    assert 0.5 <= logits_TE.min() < 0.51 and 1.49 < logits_TE.max() <= 1.5
    assert logits_TE.mean() == pytest.approx(1.0, abs=0.02)
    assert logits_TE.std() == pytest.approx(12**-0.5, rel=0.05)
    assert noisy.key.shape == (100,)  # one for each token


# In someone else's model.


class Host(nnx.Module):
    """A foreign network with one of our layers in it."""

    def __init__(self, router: Any, config: MoeConfig, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(DIM, DIM, rngs=rngs)
        self.experts = moejax.MoE(ModelConfig(dim=DIM, heads=1, ffn=FFN), config, router, rngs=rngs)

    def __call__(self, x_BSD: jax.Array, **options: Any) -> tuple[jax.Array, moejax.MoeStats]:
        x_BSD = self.first(x_BSD)
        y_BSD, stats = self.experts(x_BSD, **options)
        return x_BSD + y_BSD, stats


def loudest(r: RouterInput, *, k: int = 1, floor: float = 0.0) -> Routing:
    """A user's own router: sigmoid scores, raw, none below a floor."""
    scores_TE = jax.nn.sigmoid(r.logits_TE)
    weight_TK, expert_TK = jax.lax.top_k(scores_TE, k)
    expert_TK = jnp.where(weight_TK >= floor, expert_TK, scores_TE.shape[-1])
    return token_choice(r, expert_TK, weight_TK, scores_TE)


@pytest.mark.parametrize("dispatch", ["einsum", "gather", "dropless"])
@pytest.mark.parametrize("router", ["topk", loudest], ids=["topk", "own"])
def test_layer_in_a_foreign_module(router: Any, dispatch: str) -> None:
    model = Host(router, MoeConfig(EXPERTS, dispatch=dispatch), nnx.Rngs(0))
    graph, params = nnx.split(model)

    @jax.jit
    def step(params):
        def loss(params):
            y_BSD, stats = nnx.merge(graph, params)(X_BSD)
            return jnp.square(y_BSD - 1.0).mean(), stats

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return value, stats, gradient, jax.tree.map(lambda w, g: w - 0.1 * g, params, gradient)

    value, stats, gradient, params = step(params)
    assert int(stats.load_E.sum()) == (2 if router == "topk" else 1) * ROWS * LENGTH
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    assert step(params)[0] < value


def test_own_router_with_options_and_a_capacity() -> None:
    config = RouterConfig(loudest, (("k", 3), ("floor", 0.5)))
    model = Host(config, MoeConfig(EXPERTS, capacity_factor=0.5), nnx.Rngs(0))
    _, stats = model(X_BSD)
    assert 0 < int(stats.load_E.sum()) < 3 * ROWS * LENGTH
    assert int(stats.kept_E.max()) <= 5 < int(stats.load_E.max())  # ceil(.5 x 36 / 4)


def test_a_router_may_look_at_the_token_ids() -> None:
    def by_id(r: RouterInput) -> Routing:
        expert_TK = (r.token_T % EXPERTS)[:, None]
        scores_TE = jax.nn.one_hot(expert_TK[:, 0], EXPERTS)
        return token_choice(r, expert_TK, jnp.ones(expert_TK.shape), scores_TE)

    model = Host(by_id, MoeConfig(EXPERTS, groups="position"), nnx.Rngs(0))
    token_BS = jnp.asarray([[0, 1, 1, 2, 2, 2], [4, 5, 5, 6, 6, 6]])
    assert model(X_BSD, token_BS=token_BS)[1].load_E.tolist() == [2, 4, 6, 0]


def test_shared_experts_work_on_every_token_ungated() -> None:
    # A layer whose routed experts are all full of padding gives the shared ones' output alone.
    model = ModelConfig(dim=DIM, heads=1, ffn=FFN)
    layer = moejax.MoE(model, MoeConfig(EXPERTS, shared=2), rngs=nnx.Rngs(0))
    none_BS = jnp.zeros((ROWS, LENGTH), bool)
    shared_BSD, _ = layer(X_BSD, valid_BS=none_BS)
    w_in, w_gate, w_out = (
        getattr(layer.shared, name)[...] for name in ("w_in_DF", "w_gate_DF", "w_out_FD")
    )
    assert w_in.shape == (DIM, 2 * FFN)
    close(shared_BSD, (jax.nn.silu(X_BSD @ w_gate) * (X_BSD @ w_in)) @ w_out)
    both_BSD, _ = layer(X_BSD)
    alone = moejax.MoE(model, MoeConfig(EXPERTS), rngs=nnx.Rngs(0))
    close(both_BSD - shared_BSD, alone(X_BSD)[0], 1e-4)


def test_state_of_the_layer_goes_in_and_is_never_written() -> None:
    router = RouterConfig("loss_free", (("k", 1), ("bias_rate", 0.1)))
    model = ModelConfig(dim=DIM, heads=1, ffn=FFN)
    layer = moejax.MoE(model, MoeConfig(EXPERTS), router, rngs=nnx.Rngs(0))
    state = layer.init_state()
    assert state.tolist() == [0.0] * EXPERTS
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    _, stats = layer(X_BSD, state=state)
    _, again = layer(X_BSD, state=state)
    jax.tree.map(np.testing.assert_array_equal, again, stats)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(layer)), before)
    moved = layer.router.update(state, stats)
    want = 0.1 * np.sign(ROWS * LENGTH / EXPERTS - np.asarray(stats.load_E))
    np.testing.assert_allclose(moved, want, rtol=1e-6)
    assert moejax.MoE(model, MoeConfig(EXPERTS), "topk", rngs=nnx.Rngs(0)).init_state() is None
