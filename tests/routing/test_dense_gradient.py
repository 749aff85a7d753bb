"""Routers' gradients against that of the dense mixture: every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import Experts, make_plan
from moejax.moe import MoeOptions, MoeParams, moe, router_input
from moejax.reference import dense_moe
from moejax.routing import RouterInput, combine_TE, make_router, moe_stats
from moejax.routing.balance import BALANCE_LOSSES
from moejax.routing.dense_gradient import (
    default_moe,
    densemixer,
    dselect_k,
    near_best,
    selector_columns,
    small_uniform,
    smooth_step,
    sparsemixer2,
    update_means,
)
from tests.dispatch.plans import plain_input

TOKENS, EXPERTS, DIM, FFN = 12, 4, 6, 8
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


PARAMS = MoeParams(
    normal(DIM, EXPERTS), Experts(normal(EXPERTS, DIM, FFN) / 2, normal(EXPERTS, FFN, DIM) / 2)
)
X_BSD, CUT_BSD = normal(2, 6, DIM), normal(2, 6, DIM)
ALL_BS = jnp.ones((2, 6), bool)


@functools.partial(jax.jit, static_argnums=(0, 1))
def layer(name: str, options: tuple[tuple[str, object], ...], p: MoeParams, x_BSD, state=None):
    """Output, statistics, and the gradients of one projection of the output by p and x."""
    settings = MoeOptions(make_router(name, dict(options)), "gather", "relu")

    def loss(p, x_BSD):
        y_BSD, stats = moe(p, x_BSD, options=settings, valid_BS=ALL_BS, state=state)
        return (y_BSD * CUT_BSD).sum(), (y_BSD, stats)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(p, x_BSD)


@jax.jit
def dense(p: MoeParams, x_BSD: jax.Array):
    """The dense mixture's output and the gradient of its projection by the router's weights."""

    def loss(w_router_DE):
        x_TD = x_BSD.reshape(-1, DIM)
        r = router_input(p._replace(w_router_DE=w_router_DE), x_TD, ALL_BS, None, None, None, 0.0)
        y_TD = dense_moe(p.experts, x_TD, jax.nn.softmax(r.logits_TE), "relu")
        return (y_TD.reshape(x_BSD.shape) * CUT_BSD).sum(), y_TD.reshape(x_BSD.shape)

    return jax.grad(loss, has_aux=True)(p.w_router_DE)


def close(got, want, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


# DenseMixer.


@pytest.mark.parametrize("k", [1, 2])
def test_densemixer_is_topk_forward_and_the_dense_mixture_for_the_router(k: int) -> None:
    (p_grad, _), (y_BSD, stats) = layer("densemixer", (("k", k),), PARAMS, X_BSD)
    (topk_grad, _), (topk_BSD, topk_stats) = layer("topk", (("k", k),), PARAMS, X_BSD)
    dense_grad, dense_BSD = dense(PARAMS, X_BSD)
    np.testing.assert_array_equal(y_BSD, topk_BSD)  # bit by bit
    jax.tree.map(close, p_grad.experts, topk_grad.experts)  # no gradient to experts not chosen
    close(p_grad.w_router_DE, dense_grad)
    assert np.abs(topk_grad.w_router_DE - dense_grad).max() > 0.1 * np.abs(dense_grad).max()
    assert np.abs(y_BSD - dense_BSD).max() > 0.01
    assert stats.load_E.tolist() == topk_stats.load_E.tolist()
    assert stats.first_E.tolist() == topk_stats.first_E.tolist()


def test_densemixers_inputs_get_no_gradient_from_experts_not_chosen() -> None:
    # With the router's weights 0 all of x's gradient comes through the experts.
    still = PARAMS._replace(w_router_DE=jnp.zeros((DIM, EXPERTS)))
    (_, x_grad), _ = layer("densemixer", (), still, X_BSD)
    (_, topk_grad), _ = layer("topk", (), still, X_BSD)
    close(x_grad, topk_grad)


def test_densemixer_renormalised_by_hand() -> None:
    # p = (.5, .3, .2), K = 2, Z = .8: weights .625, .375, and 0 with the gradient of p / .8.
    logits_TE = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))

    def weights(logits_TE):
        return densemixer(plain_input(logits_TE), renormalise=True).weight_N

    routing = densemixer(plain_input(logits_TE), renormalise=True)
    assert routing.expert_N.tolist() == [0, 1, 2] and routing.choice_N.tolist() == [0, 1, -1]
    np.testing.assert_allclose(routing.weight_N, [0.625, 0.375, 0.0], rtol=1e-6)
    jacobian = jax.jacobian(weights)(logits_TE)[:, 0]
    # The chosen: softmax over two: .625 x .375. The third: p3 (delta - p) / .8.
    s = 0.625 * 0.375
    want = [[s, -s, 0], [-s, s, 0], [-0.125, -0.075, 0.2]]
    np.testing.assert_allclose(jacobian, want, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="k=1 cannot be renormalised"):
        densemixer(plain_input(logits_TE), k=1, renormalise=True)


# Default MoE.


def constant_experts() -> tuple[MoeParams, jax.Array, jax.Array]:
    """Experts that look at the first feature alone, which is 1; the tokens; what experts say."""
    w_in_EDF = jnp.zeros((EXPERTS, DIM, FFN)).at[:, 0].set(jnp.abs(normal(EXPERTS, FFN)))
    p = PARAMS._replace(experts=PARAMS.experts._replace(w_in_EDF=w_in_EDF))
    said_ED = jnp.einsum("ef,efd->ed", w_in_EDF[:, 0], p.experts.w_out_EFD)
    return p, X_BSD.at[..., 0].set(1.0), said_ED


def test_default_moe_with_exact_means_is_the_dense_mixture() -> None:
    p, x_BSD, said_ED = constant_experts()
    (p_grad, _), (y_BSD, _) = layer("default_moe", (), p, x_BSD, said_ED)
    dense_grad, dense_BSD = dense(p, x_BSD)
    close(y_BSD, dense_BSD)
    close(p_grad.w_router_DE, dense_grad)
    (without_grad, _), (without_BSD, _) = layer("default_moe", (), p, x_BSD)  # no state: top-K
    (topk_grad, _), (topk_BSD, _) = layer("topk", (), p, x_BSD)
    np.testing.assert_array_equal(without_BSD, topk_BSD)
    close(without_grad.w_router_DE, topk_grad.w_router_DE)
    assert np.abs(topk_grad.w_router_DE - dense_grad).max() > 0.1 * np.abs(dense_grad).max()


def test_means_have_no_gradient_and_padding_gets_none() -> None:
    mean_ED = normal(EXPERTS, DIM)
    r = plain_input(normal(TOKENS, EXPERTS))._replace(valid_T=jnp.arange(TOKENS) < 9)

    def rest(mean_ED):
        return jnp.square(default_moe(r._replace(state=mean_ED)).rest_TD).sum()

    value, gradient_ED = jax.value_and_grad(rest)(mean_ED)
    assert value > 0.1 and not np.any(gradient_ED)
    assert not np.any(default_moe(r._replace(state=mean_ED)).rest_TD[9:])


def test_means_move_to_the_weighted_mean_output() -> None:
    p, x_BSD, said_ED = constant_experts()
    mean_ED = normal(EXPERTS, DIM)
    # Nobody likes expert 3: it keeps its mean.
    w_router_DE = p.w_router_DE.at[0, 3].add(-40.0)
    p = p._replace(w_router_DE=w_router_DE)
    _, (_, stats) = layer("default_moe", (), p, x_BSD, mean_ED)
    assert np.all(stats.load_E[:3] > 0) and int(stats.load_E[3]) == 0
    stats_L = jax.tree.map(lambda a: jnp.stack([a, a]), stats)
    moved_LED = update_means(jnp.stack([mean_ED, 2 * mean_ED]), stats_L, decay=0.9)
    want_ED = (0.9 * mean_ED + 0.1 * said_ED).at[3].set(mean_ED[3])
    close(moved_LED[0], want_ED)
    close(moved_LED[1], (1.8 * mean_ED + 0.1 * said_ED).at[3].set(2 * mean_ED[3]))


# SparseMixer-v2.


def test_who_is_near_the_best_by_hand() -> None:
    # epsilon .1: (z* - z) / max(|z|, z*) <= .2. (2 - 1.7) / 2 = .15; (2 - 1.5) / 2 = .25;
    # (-1 + 1.2) / 1.2 = .17; (-1 + 1.3) / 1.3 = .23; (1 + 5) / 5 = 1.2; -inf is out; 0 = 0 is in.
    logits_TE = jnp.asarray(
        [[2.0, 1.7, 1.5], [-1.2, -1.0, -1.3], [1.0, -5.0, -jnp.inf], [0.0, 0.0, 0.0]]
    )
    want_TE = [[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]
    np.testing.assert_array_equal(near_best(logits_TE, 0.1), np.asarray(want_TE, bool))


def test_sampling_by_its_frequencies() -> None:
    # p = softmax(2, 1.8) without the third: .55, .45. Off the best expert m = 1 in 1/4 of the
    # cases, else 1/3, 1/2 on average.
    many, p = 20_000, 1 / (1 + np.exp(-0.2))
    logits_TE = jnp.tile(jnp.asarray([[2.0, 1.8, 1.0]]), (many, 1))
    routing = sparsemixer2(plain_input(logits_TE, key=jax.random.key(0)), k=1)
    weight_TE = np.asarray(combine_TE(routing))
    assert not np.any(weight_TE[:, 2])
    best = weight_TE[weight_TE[:, 0] > 0, 0]
    other = weight_TE[weight_TE[:, 1] > 0, 1]
    assert len(best) / many == pytest.approx(p, abs=0.02)
    np.testing.assert_allclose(best, p, rtol=1e-5)
    assert np.unique(np.round(other / (1 - p), 4)).tolist() == pytest.approx([1 / 3, 1], rel=1e-3)
    assert other.mean() / (1 - p) == pytest.approx(0.5, abs=0.02)
    quiet = sparsemixer2(plain_input(logits_TE[:5]), k=1)
    assert quiet.expert_N.tolist() == [0] * 5
    np.testing.assert_allclose(quiet.weight_N, p, rtol=1e-5)


def test_router_sees_the_gradient_as_if_nothing_were_scaled() -> None:
    logits_TE, key = normal(64, EXPERTS), jax.random.key(1)
    cut_TE = normal(64, EXPERTS)

    @jax.jit
    def routing(logits_TE):
        return sparsemixer2(plain_input(logits_TE, key=key), k=1, epsilon=1.0)

    expert_T = np.asarray(routing(logits_TE).expert_N)
    keep_TE = near_best(logits_TE, 1.0)

    def papers(logits_TE):
        probs_TE = jax.nn.softmax(jnp.where(keep_TE, logits_TE, -jnp.inf))
        return (probs_TE * cut_TE)[jnp.arange(64), expert_T].sum()

    got = jax.grad(lambda logits_TE: (combine_TE(routing(logits_TE)) * cut_TE).sum())(logits_TE)
    close(got, jax.grad(papers)(logits_TE))
    probs_T = jax.nn.softmax(jnp.where(keep_TE, logits_TE, -jnp.inf))[jnp.arange(64), expert_T]
    assert np.any(routing(logits_TE).weight_N < 0.9 * probs_T)  # something was scaled


def test_later_draws_leave_out_the_earlier_ones() -> None:
    r = plain_input(normal(256, EXPERTS), key=jax.random.key(2))
    routing = sparsemixer2(r, k=EXPERTS, epsilon=1.0)
    assert np.all(np.asarray(combine_TE(routing)) > 0)  # all four, each once
    expert_KT = np.asarray(routing.expert_N).reshape(EXPERTS, -1)
    left = np.take_along_axis(np.asarray(r.logits_TE), expert_KT.T, axis=1)
    assert np.any(left[:, 1] > left[:, 0])  # drawn, not sorted
    np.testing.assert_allclose(np.asarray(routing.weight_N)[-256:], 1.0)  # the last has no rival
    with pytest.raises(ValueError, match="need 1 <= k <= 4 experts, got k=5"):
        sparsemixer2(r, k=5)


# DSelect-k.


@functools.partial(jax.jit, static_argnames=("experts", "k"))
def selected(bits_TX, experts: int, k: int):
    """The routing, and its statistics, of given projections."""
    extra_TX = jnp.asarray(bits_TX, jnp.float32)
    r = RouterInput(jnp.zeros((len(extra_TX), experts)), jnp.ones(len(extra_TX), bool))
    routing = dselect_k(r._replace(extra_TX=extra_TX), k=k)
    return routing, moe_stats(r, routing, make_plan(routing, None))


def test_smooth_step_by_hand() -> None:
    # t = 1/4: -2 / 64 + 3 / 8 + 1 / 2 = .84375. For gamma = 2 the same at t = 1/2. Flat outside.
    t = jnp.asarray([-3.0, -0.5, 0.0, 0.25, 0.5, 3.0])
    np.testing.assert_allclose(smooth_step(t, 1.0), [0, 0, 0.5, 0.84375, 1, 1])
    np.testing.assert_allclose(smooth_step(jnp.asarray([0.5]), 2.0), [0.84375])
    slope = jax.vmap(jax.grad(lambda t: smooth_step(t, 1.0)))(t)
    np.testing.assert_allclose(slope[jnp.asarray([0, 1, 2, 4, 5])], [0, 0, 1.5, 0, 0], atol=1e-6)


def test_shares_by_hand() -> None:
    # One selector of two bits, the first the low one: .84375 and .5, so expert 0 (00) has
    # .15625 x .5, expert 1 (low bit) .84375 x .5, and so on.
    routing, _ = selected([[0.25, 0.0, 7.0]], experts=4, k=1)
    want_TE = [[0.078125, 0.421875, 0.078125, 0.421875]]
    np.testing.assert_allclose(combine_TE(routing), want_TE, rtol=1e-6)
    # Two selectors: expert 2 (bits 0 1) with weight 3/4, expert 1 (bits 1 0) with 1/4.
    bits = [-9.0, 9.0, 9.0, -9.0, np.log(3.0), 0.0]
    routing, stats = selected([bits], experts=4, k=2)
    np.testing.assert_allclose(combine_TE(routing), [[0, 0.25, 0.75, 0]], rtol=1e-6)
    assert routing.expert_N.tolist() == [2, 1, 4, 4] and stats.load_E.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("experts", [4, 8])
def test_shares_sum_to_one_and_at_most_k_remain(experts: int) -> None:
    columns = selector_columns(experts, k=2)
    assert columns == 2 * (int(np.log2(experts)) + 1)
    soft, _ = selected(0.3 * normal(32, columns), experts, 2)
    np.testing.assert_allclose(combine_TE(soft).sum(1), 1.0, rtol=1e-5)
    assert np.all((np.asarray(combine_TE(soft)) > 0).sum(1) > 2)
    hard, stats = selected(jnp.where(normal(32, columns) > 0, 0.5, -0.5), experts, 2)
    count_T = (np.asarray(combine_TE(hard)) > 0).sum(1)
    assert count_T.max() == 2 and count_T.min() >= 1 and int(stats.load_E.sum()) == count_T.sum()


def test_entropy_and_reach() -> None:
    entropy, reach = (BALANCE_LOSSES[name] for name in ("selector_entropy", "selector_reach"))
    _, middle = selected(np.zeros((3, 6)), experts=4, k=2)
    assert entropy(middle) == pytest.approx(2 * np.log(4)) and reach(middle) == pytest.approx(1)
    _, binary = selected(np.full((3, 6), 0.5), experts=4, k=2)
    assert entropy(binary) == 0.0
    # Three experts of four codes, each 1/4: the fourth is lost, 1 / (3/4).
    routing, lost = selected(np.zeros((3, 6)), experts=3, k=2)
    np.testing.assert_allclose(combine_TE(routing), 0.25, rtol=1e-6)
    assert reach(lost) == pytest.approx(4 / 3)
    assert entropy(lost) == pytest.approx(2 * 0.75 * np.log(4))
    # The loss pulls the selector's bits off code 3 = (1, 1); no gradient is infinite.

    def loss(bits):
        return reach(selected(bits, experts=3, k=1)[1])

    gradient = jax.grad(loss)(jnp.asarray([[0.1, 0.1, 0.0]]))
    assert np.all(np.asarray(gradient)[0, :2] > 0.1)
    far = jax.grad(loss)(jnp.asarray([[0.5, 0.5, 0.0]]))
    assert np.all(np.isfinite(far)) and np.isfinite(loss(jnp.asarray([[0.5, 0.5, 0.0]])))


def test_selectors_start_in_the_middle_and_misfits_are_refused() -> None:
    w_DX = small_uniform(jax.random.key(0), (64, 6))
    assert 0.009 < np.abs(w_DX).max() <= 0.01 and np.abs(w_DX.mean()) < 0.002
    with pytest.raises(
        ValueError, match="k=2 selectors of 4 experts look at 6 further projections"
    ):
        selected(np.zeros((3, 5)), experts=4, k=2)
    r = plain_input(jnp.zeros((3, 4)))
    routing = densemixer(r)
    with pytest.raises(ValueError, match="selector_entropy needs the router's own sum"):
        BALANCE_LOSSES["selector_entropy"](moe_stats(r, routing, make_plan(routing, None)))
