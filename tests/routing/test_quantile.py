"""Thresholds exactly and from histograms, by hand, by another project's numbers, and in use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import make_plan, route
from moejax.routing import LayerSize, MoeStats, RouterInput, combine_TE, make_router, moe_stats
from moejax.routing.metrics import max_vio
from moejax.routing.quantile import (
    histogram,
    quantile_balancing,
    quantile_beta,
    quantile_of,
    update_beta,
)
from tests.dispatch.plans import plain_input
from tests.oracle import case

RANDOM = np.random.default_rng(0)
SCORES_TE = jnp.asarray([[3.0, 1.0], [2.0, 1.0], [1.5, 1.0], [1.2, 1.0]])


def test_midpoint_by_hand() -> None:
    # K = 1, n = 2. alpha = 1 for all. s - alpha of expert 0: 2, 1, .5, .2: (1 + .5) / 2 = .75; of
    # expert 1: 0. Then l - beta = 2.25, 1.25, .75, .45 against 1: two tokens each.
    beta_E = quantile_beta(SCORES_TE, jnp.zeros(2), 1)
    np.testing.assert_allclose(beta_E, [0.75, 0.0], atol=1e-6)
    assert np.bincount((SCORES_TE - beta_E[None]).argmax(1)).tolist() == [2, 2]
    # Rank 2 is 1, rank 3 is .5.
    for offset, beta in ((0.0, 1.0), (0.25, 0.875), (1.0, 0.5)):
        got_E = quantile_beta(SCORES_TE, jnp.zeros(2), 1, offset)
        np.testing.assert_allclose(got_E, [beta, 0.0], atol=1e-6)


def test_thresholds_of_megatron() -> None:
    found = case("bias_updates/quantile_balancing")
    logits_TE = jnp.asarray(found["inputs"]["logits_LTE"][0], jnp.float32)
    beta_E = quantile_beta(logits_TE, jnp.zeros(4), 2, offset=1.0)
    # The case's 1e-9 is of float64; the logits have two or three decimals.
    np.testing.assert_allclose(beta_E, found["expected"]["beta_E"], atol=1e-6)


def test_quantile_of_a_histogram_by_hand() -> None:
    # Four bins between -2, -.5, 0, .5, 2 (roots -1, -1/2, 0, 1/2, 1), with 2, 0, 0, 4 tokens.
    counts_Q = jnp.asarray([2, 0, 0, 4], jnp.int32)
    for count, at in (
        (1.0, 1.53125),  # a quarter of the last bin: root 7/8
        (3.0, 0.78125),  # root 5/8
        (4.0, 0.0),  # anywhere from -.5 to .5
        (5.0, -1.125),  # root -3/4
        (6.0, -2.0),
        (9.0, -2.0),
    ):
        assert quantile_of(counts_Q, jnp.asarray(count)) == pytest.approx(at), count


def test_histogram_counts_real_tokens_and_keeps_what_is_outside() -> None:
    margin_TE = jnp.asarray([[-1.5, 0.2], [-9.0, 9.0], [0.3, 0.3]])
    counts_EQ = histogram(margin_TE, jnp.asarray([True, True, False]), 4)
    assert counts_EQ.tolist() == [[2, 0, 0, 0], [0, 0, 1, 1]]


@jax.jit
def stats_of(r: RouterInput) -> MoeStats:
    routing = quantile_balancing(r, k=2)
    return moe_stats(r, routing, make_plan(routing, None))


def updated(beta_E: jax.Array, stats: MoeStats, **options: object) -> jax.Array:
    (next_E,) = update_beta(beta_E[None], jax.tree.map(lambda a: a[None], stats), **options)
    return next_E


LOGITS_TE = jnp.asarray(RANDOM.normal(size=(512, 8)) + np.linspace(-1, 1, 8), jnp.float32)


@pytest.mark.parametrize("tokens", [512, 128, 509])  # n = 128, 32; 127.25
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_histogram_is_the_exact_quantile_to_a_bins_width(tokens: int, shift: float) -> None:
    beta_E = jnp.asarray(RANDOM.normal(size=8, scale=0.1), jnp.float32) + shift
    logits_TE = LOGITS_TE[:tokens]
    stats = stats_of(plain_input(logits_TE, state=beta_E))
    exact_E = quantile_beta(jax.nn.sigmoid(logits_TE), beta_E, 2)
    got_E = updated(beta_E, stats, centre=False)
    # A bin is from 2 (i / 1024)^2 to 2 ((i + 1) / 1024)^2.
    width_E = 2 * (2 * np.sqrt(np.abs(exact_E - beta_E) / 2) + 1 / 1024) / 1024
    width_E = 1.01 * width_E + 1e-6
    if tokens == 509:  # no midpoint of two tokens, but still between the ones beside it
        upper_E, lower_E = (
            quantile_beta(jax.nn.sigmoid(logits_TE), beta_E, 2, offset) for offset in (-0.5, 1.5)
        )
        assert np.all((lower_E - width_E <= got_E) & (got_E <= upper_E + width_E))
    else:
        assert np.all(np.abs(got_E - exact_E) <= width_E)
    assert np.median(np.abs(exact_E - beta_E)) > 20 * np.median(width_E)
    # And the exact one has the fair share of tokens above it: no more, and no less with those on it
    # (for which this expert is the K+1-st).
    scores_TE = np.asarray(jax.nn.sigmoid(logits_TE))
    alpha_T1 = -np.sort(-(scores_TE - np.asarray(beta_E)), axis=1)[:, 2:3]
    fair, gap_TE = 2 * tokens / 8, scores_TE - alpha_T1 - np.asarray(exact_E)
    assert np.all((gap_TE > 1e-6).sum(0) <= fair + 1)
    assert np.all((gap_TE > -1e-6).sum(0) >= fair - 1)


def test_thresholds_do_not_depend_on_how_a_batch_is_cut() -> None:
    valid_T = jnp.asarray(RANDOM.random(512) < 0.8)
    r = RouterInput(LOGITS_TE, valid_T)
    whole = stats_of(r)
    quarters = [
        stats_of(RouterInput(LOGITS_TE[i : i + 128], valid_T[i : i + 128]))
        for i in range(0, 512, 128)
    ]
    summed = jax.tree.map(lambda *parts: sum(parts), *quarters)
    np.testing.assert_array_equal(summed.own["margin_EQ"], whole.own["margin_EQ"])
    np.testing.assert_array_equal(updated(jnp.zeros(8), summed), updated(jnp.zeros(8), whole))
    routing = route(make_router("quantile_balancing").route, r, 4, "sequence")
    np.testing.assert_array_equal(routing.sums["margin_EQ"], whole.own["margin_EQ"])
    # Padding is no part of it: the real tokens alone say the same.
    alone = stats_of(RouterInput(LOGITS_TE[valid_T], jnp.ones(int(valid_T.sum()), bool)))
    np.testing.assert_array_equal(alone.own["margin_EQ"], whole.own["margin_EQ"])


def test_average_and_centre() -> None:
    stats = stats_of(plain_input(LOGITS_TE))
    start_E = jnp.full(8, 0.3)  # the same choices as 0
    star_E = updated(start_E, stats, centre=False)
    assert np.abs(star_E.mean()) > 0.2
    np.testing.assert_allclose(updated(start_E, stats), star_E - star_E.mean(), atol=1e-6)
    slow_E = updated(start_E, stats, ema=0.9, centre=False)
    np.testing.assert_allclose(slow_E, 0.27 + 0.1 * star_E, atol=1e-6)
    none = stats_of(RouterInput(LOGITS_TE, jnp.zeros(512, bool)))
    assert updated(jnp.full(8, 0.3), none).tolist() == pytest.approx([0.3] * 8)


def test_one_batch_is_balanced_in_four_steps() -> None:
    router = make_router("quantile_balancing", {"k": 2})
    beta_E, seen = router.init(LayerSize(8)), []
    for _ in range(5):
        stats = stats_of(plain_input(LOGITS_TE, state=beta_E))
        seen.append(float(max_vio(stats.load_E)))
        beta_E = updated(beta_E, stats)
    assert seen[0] > 1.0 and seen[4] < 0.06, seen


def test_threshold_selects_and_never_weighs() -> None:
    # s - beta = (.3, .8, .4, .2): experts 1 and 2, with the weights s = .8, .1.
    s_TE = jnp.asarray([[0.9, 0.8, 0.1, 0.2]])
    logits_TE = jnp.log(s_TE / (1 - s_TE))
    r = plain_input(logits_TE, state=jnp.asarray([0.6, 0.0, -0.3, 0.0]))
    np.testing.assert_allclose(combine_TE(quantile_balancing(r)), [[0.0, 0.8, 0.1, 0.0]], rtol=1e-5)
    renormalised_TE = combine_TE(quantile_balancing(r, renormalise=True))
    np.testing.assert_allclose(renormalised_TE, [[0.0, 8 / 9, 1 / 9, 0.0]], rtol=1e-5)
    by_beta = jax.jacrev(lambda beta_E: combine_TE(quantile_balancing(r._replace(state=beta_E))))
    assert not np.any(by_beta(r.state))
    softmax_TE = combine_TE(quantile_balancing(plain_input(jnp.log(s_TE)), score="softmax"))
    np.testing.assert_allclose(softmax_TE, [[0.45, 0.4, 0.0, 0.0]], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 4}, "k=4 of 4 experts; needs k < experts"),
        ({"k": 1, "renormalise": True}, "weight 1 has no gradient"),
        ({"score": "relu"}, "unknown score='relu'"),
    ],
)
def test_what_quantile_balancing_cannot_do_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantile_balancing(plain_input(jnp.zeros((2, 4))), **options)
