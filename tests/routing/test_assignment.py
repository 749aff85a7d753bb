"""Batch assignment: the auction against the optimal assignment, plans by their sums, rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment, linprog

from moejax.causality import dependence
from moejax.dispatch import make_plan
from moejax.moe import MoeOptions
from moejax.routing import combine_TE, make_router, moe_stats
from moejax.routing.assignment import (
    ROUTERS,
    auction,
    base,
    round_load,
    sinkhorn,
    sinkhorn_plan,
    token_rounding,
)
from moejax.routing.expert_choice import capped_plan, expert_choice, expert_choice_capped
from tests.dispatch.plans import plain_input

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)


def logits(tokens: int, experts: int, crowd: float = 0.0, scale: float = 1.0) -> jax.Array:
    """Random logits, all tokens leaning to expert 0."""
    logits_TE = scale * RANDOM.normal(size=(tokens, experts))
    logits_TE[:, 0] += crowd
    return jnp.asarray(logits_TE, jnp.float32)


# BASE.


def optimum(value_TE: np.ndarray, places: int) -> float:
    """The best sum with at most `places` tokens an expert: columns repeated."""
    columns_TN = np.repeat(np.asarray(value_TE, np.float64), places, axis=1)
    return columns_TN[linear_sum_assignment(-columns_TN)].sum()


@functools.partial(jax.jit, static_argnames="epsilon")
def assigned(value_TE, valid_T, epsilon: float = 1e-3):
    return auction(value_TE, valid_T, epsilon=epsilon, rounds=1000)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
@pytest.mark.parametrize(("crowd", "scale"), [(0.0, 1.0), (5.0, 1.0), (0.0, 0.01), (0.0, 0.0)])
def test_auction_is_within_t_epsilon_of_the_optimum(crowd, scale, epsilon) -> None:
    value_TE = logits(48, 6, crowd, scale)
    expert_T = np.asarray(assigned(value_TE, jnp.ones(48, bool), epsilon))
    assert np.bincount(expert_T, minlength=6).tolist() == [8] * 6  # MaxVio 0
    total = float(np.asarray(value_TE)[np.arange(48), expert_T].sum())
    best = optimum(value_TE, 8)
    assert best - 48 * epsilon - 1e-4 <= total <= best + 1e-4


def test_a_coarse_auction_is_worse_than_a_fine_one() -> None:
    # So that the bound above is not met by luck: with steps of 1 the sum is clearly lower.
    value_TE = logits(48, 6)
    coarse, fine = (
        float(value_TE[jnp.arange(48), assigned(value_TE, jnp.ones(48, bool), epsilon)].sum())
        for epsilon in (1.0, 1e-3)
    )
    assert coarse < fine - 0.01


def test_padding_takes_no_place_in_the_auction() -> None:
    # 21 real tokens for 6 experts: at most ceil(21 / 6) = 4 each, as good as without the padding.
    valid_T = jnp.asarray(RANDOM.permutation(48) < 21)
    value_TE = logits(48, 6, crowd=3.0)
    expert_T = np.asarray(assigned(value_TE, valid_T))
    real = np.asarray(valid_T)
    assert np.all(expert_T[~real] == 6) and np.bincount(expert_T[real], minlength=7).max() <= 4
    total = np.asarray(value_TE)[np.flatnonzero(real), expert_T[real]].sum()
    assert total >= optimum(np.asarray(value_TE)[real], 4) - 21e-3 - 1e-4
    assert np.all(np.asarray(assigned(value_TE, jnp.zeros(48, bool))) == 6)


def test_base_by_hand() -> None:
    # Both prefer expert 0: t0 by 3 - 1 = 2, t1 by 1. t0 gets it; evaluation gives it to both.
    logits_TE = jnp.asarray([[3.0, 1.0], [2.0, 1.0]])
    routing = base(plain_input(logits_TE, key=KEY))
    assert routing.expert_N.tolist() == [0, 1] and int(routing.sums["unassigned"]) == 0
    np.testing.assert_allclose(routing.weight_N, jax.nn.sigmoid(jnp.asarray([3.0, 1.0])), rtol=1e-6)
    assert base(plain_input(logits_TE)).expert_N.tolist() == [0, 0]

    # No gradient through the assignment; through the sigmoid, s (1 - s) at the pair.
    def total(logits_TE):
        return base(plain_input(logits_TE, key=KEY)).weight_N.sum()

    s = np.asarray(jax.nn.sigmoid(jnp.asarray([3.0, 1.0])))
    want_TE = np.diag(s * (1 - s))
    np.testing.assert_allclose(jax.grad(total)(logits_TE), want_TE, rtol=1e-5, atol=1e-9)


def test_base_reports_who_is_left_over_and_sends_them_nowhere() -> None:
    # One round: all bid for expert 0, which keeps 4 of 16.
    r = plain_input(logits(16, 4, crowd=20.0), key=KEY)
    routing = base(r, rounds=1)
    stats = moe_stats(r, routing, make_plan(routing, None))
    assert int(stats.own["unassigned"]) == 12 == int(stats.left_behind)
    assert stats.load_E.tolist() == [4, 0, 0, 0]


def test_base_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="14 tokens of a group are not divisible by 4 experts"):
        base(plain_input(jnp.zeros((14, 4)), key=KEY))
    assert base(plain_input(jnp.zeros((14, 4)))).expert_N.shape == (14,)  # evaluation may
    with pytest.raises(ValueError, match="got k=2; use sinkhorn"):
        base(plain_input(jnp.zeros((16, 4)), key=KEY), k=2)


def test_base_starts_from_small_orthogonal_directions() -> None:
    w_DE = ROUTERS["base"].weights(KEY, (16, 4))
    np.testing.assert_allclose(w_DE.T @ w_DE, 0.01 * np.eye(4), atol=1e-7)


# Sinkhorn.


@pytest.mark.parametrize("scale", [1.0, 60.0])  # exp(60 x 3) would overflow
def test_plan_has_the_sums_it_should(scale: float) -> None:
    valid_T = jnp.asarray(RANDOM.random(40) < 0.7)
    log_TE = sinkhorn_plan(logits(40, 5, 2.0, scale), valid_T, tolerance=1e-6, iterations=5000)
    plan_TE, tokens = np.exp(np.asarray(log_TE, np.float64)), int(valid_T.sum())
    np.testing.assert_allclose(plan_TE.sum(1), np.asarray(valid_T) / tokens, rtol=1e-4)
    np.testing.assert_allclose(plan_TE.sum(0), 0.2, rtol=2e-3)


def test_plan_is_the_logits_rescaled() -> None:
    # log pi - logits = u_t + v_e: crossed differences vanish. And it is capped.
    logits_TE = logits(12, 4, 3.0)
    log_TE = sinkhorn_plan(logits_TE, jnp.ones(12, bool))
    rest_TE = np.asarray(log_TE - logits_TE)
    cross_TE = rest_TE - rest_TE[:1] - rest_TE[:, :1] + rest_TE[0, 0]
    np.testing.assert_allclose(cross_TE, 0, atol=1e-5)
    short_TE = sinkhorn_plan(logits_TE, jnp.ones(12, bool), iterations=1)
    assert np.abs(np.exp(short_TE).sum(0) - 0.25).max() > 0.01


def test_sinkhorn_spreads_in_training_and_takes_the_best_in_evaluation() -> None:
    logits_TE = logits(64, 4, crowd=3.0)

    def loads(**kind):
        r = plain_input(logits_TE, **kind)
        routing = sinkhorn(r)
        return moe_stats(r, routing, make_plan(routing, None)).load_E

    assert loads(key=KEY).max() <= 24 < 48 < loads().max()
    two = sinkhorn(plain_input(logits_TE, key=KEY), k=2)
    weight_TE, probs_TE = np.asarray(combine_TE(two)), np.asarray(jax.nn.softmax(logits_TE))
    assert np.all((weight_TE > 0).sum(1) == 2)
    np.testing.assert_allclose(weight_TE, probs_TE * (weight_TE > 0), rtol=1e-6)
    one = np.asarray(combine_TE(sinkhorn(plain_input(logits_TE, key=KEY))))
    np.testing.assert_allclose(one, jax.nn.sigmoid(logits_TE) * (one > 0), rtol=1e-6)


# Token rounding.


def test_rounding_by_hand() -> None:
    # Tiles of 4. Halves go to the even multiple: 2 -> 0, 6 -> 8, 10 -> 8. 13 -> 12, or 16 if up.
    load_E = jnp.asarray([0, 2, 3, 6, 8, 10, 13])

    def rounded(rounding: str, most: int = 100) -> list[int]:
        return round_load(load_E, 4, rounding, jnp.asarray(most)).tolist()

    assert rounded("nearest") == [0, 0, 4, 8, 8, 8, 12]
    assert rounded("up") == [0, 4, 4, 8, 8, 12, 16]
    assert rounded("down") == [0, 0, 0, 4, 8, 8, 12]
    assert rounded("up", most=13) == [0, 4, 4, 8, 8, 12, 12]  # not 16 of 13 tokens


ROUNDED_TE = jnp.asarray(
    [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.7, 0.2, 0.1], [0.5, 0.2, 0.3], [0.1, 0.3, 0.6]]
)


@pytest.mark.parametrize(
    ("rounding", "want_TE"),
    [
        # Loads: e0 (t0 t1 t2 t3) 4, e1 (t0 t1 t2 t4) 4, e2 (t3 t4) 2; tiles of 3 (fair share 3).
        # Weights for e0: 2/3 5/9 7/9 5/8; for e1: 1/3 4/9 2/9 1/3; for e2: 3/8 2/3.
        # Nearest: 3, 3, 3. e0 loses t1, e1 loses t2; e2 gets t0, the first of .1, at its raw .1.
        (
            "nearest",
            [
                [2 / 3, 1 / 3, 0.1],
                [0, 4 / 9, 0],
                [7 / 9, 0, 0],
                [5 / 8, 0, 3 / 8],
                [0, 1 / 3, 2 / 3],
            ],
        ),
        # Up: 6 is more than 5 tokens, so 3, 3; e2 as above.
        (
            "up",
            [
                [2 / 3, 1 / 3, 0.1],
                [0, 4 / 9, 0],
                [7 / 9, 0, 0],
                [5 / 8, 0, 3 / 8],
                [0, 1 / 3, 2 / 3],
            ],
        ),
        # Down: e2 loses both of its tokens.
        ("down", [[2 / 3, 1 / 3, 0], [0, 4 / 9, 0], [7 / 9, 0, 0], [5 / 8, 0, 0], [0, 1 / 3, 0]]),
    ],
)
def test_rounded_routing_by_hand(rounding: str, want_TE) -> None:
    r = plain_input(jnp.log(ROUNDED_TE), key=KEY)
    routing = token_rounding(r, tile=4, rounding=rounding)
    np.testing.assert_allclose(combine_TE(routing), want_TE, rtol=1e-5, atol=1e-7)
    stats = moe_stats(r, routing, make_plan(routing, None))
    assert stats.load_E.tolist() == (np.asarray(want_TE) > 0).sum(0).tolist()


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_loads_are_whole_tiles_near_those_of_topk(rounding: str) -> None:
    valid_T = jnp.asarray(RANDOM.random(64) < 0.8)
    r = plain_input(logits(64, 4, 1.0), key=KEY, valid_T=valid_T)
    before_E, after_E = (
        np.asarray((combine_TE(token_rounding(r, tile=tile, rounding=rounding)) > 0).sum(0))
        for tile in (1, 8)
    )
    assert before_E.sum() == 2 * int(valid_T.sum()) and np.any(before_E % 8 != 0)
    assert np.all(after_E % 8 == 0)
    change_E = after_E - before_E
    assert np.abs(change_E).max() <= (4 if rounding == "nearest" else 7)
    assert np.all(change_E >= 0 if rounding == "up" else change_E <= 4)
    assert np.any(change_E != 0)


def test_evaluation_rounds_nothing_and_options_are_checked() -> None:
    r = plain_input(jnp.log(ROUNDED_TE))
    assert (combine_TE(token_rounding(r)) > 0).sum(0).tolist() == [4, 4, 2]
    with pytest.raises(ValueError, match="needs k >= 2, got k=1"):
        token_rounding(r, k=1)
    with pytest.raises(ValueError, match="unknown rounding='even'"):
        token_rounding(r, rounding="even")
    with pytest.raises(ValueError, match="tile=0 must be at least 1"):
        token_rounding(r, tile=0)


# Capped expert choice.


def test_the_cap_by_hand() -> None:
    # C = 2, both experts like t0 and t1 best. With one expert a token at most, the sums of the
    # possible pairs of pairs: e0 {t0 t1} e1 {t2 t3} .9 + .8 + .4 + .5 = 2.6, and all others:
    # {t0 t2} {t1 t3} 2.2, {t1 t2} {t0 t3} 2.0, {t0 t3} {t1 t2} 2.0, {t1 t3} {t0 t2} 1.8 ...
    probs_TE = jnp.asarray([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.5, 0.5]])
    r = plain_input(jnp.log(probs_TE))
    routing = expert_choice_capped(r, k=1, most=1)
    assert (combine_TE(routing) > 0).astype(int).tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    np.testing.assert_allclose(combine_TE(routing).max(1), [0.9, 0.8, 0.4, 0.5], rtol=1e-6)


@pytest.mark.parametrize(("k", "most"), [(1, 1), (2, 2)])
def test_capped_choice_is_the_linear_programs(k: int, most: int) -> None:
    tokens, experts = 24, 4
    r = plain_input(logits(tokens, experts, scale=2.0))
    probs_TE = np.asarray(jax.nn.softmax(r.logits_TE), np.float64)
    capacity = k * tokens // experts
    routing = expert_choice_capped(r, k=k, most=most, iterations=5000)
    chosen_TE = np.asarray(combine_TE(routing)) > 0
    assert chosen_TE.sum(0).tolist() == [capacity] * experts
    rows = np.kron(np.ones((1, tokens)), np.eye(experts))
    columns = np.kron(np.eye(tokens), np.ones((1, experts)))
    best = linprog(
        -probs_TE.reshape(-1),
        A_ub=columns,
        b_ub=[most] * tokens,
        A_eq=rows,
        b_eq=[capacity] * experts,
        bounds=(0, 1),
    )
    assert chosen_TE.sum(1).max() <= most and int(routing.sums["crowded"]) == 0
    free_TE = np.asarray(combine_TE(expert_choice(r, k=k))) > 0
    assert free_TE.sum(1).max() > most  # the limit binds
    assert (probs_TE * chosen_TE).sum() == pytest.approx(-best.fun, rel=1e-3)
    early = expert_choice_capped(r, k=k, most=most)  # what is not finished says so
    crowd_T = (np.asarray(combine_TE(early)) > 0).sum(1) > most
    assert int(early.sums["crowded"]) == crowd_T.sum() > 0


def test_capped_plan_obeys_its_three_limits() -> None:
    benefit_ET = jax.nn.softmax(logits(20, 4, 1.0)).T / 0.05
    valid_T = jnp.arange(20) < 16
    log_ET = np.asarray(capped_plan(benefit_ET, valid_T, 8, 3, iterations=300), np.float64)
    plan_ET = np.exp(np.minimum(log_ET, 0.0))
    np.testing.assert_allclose(plan_ET.sum(1), 8, rtol=5e-3)
    assert plan_ET.sum(0).max() <= 3.01 and not np.any(plan_ET[:, 16:])


def test_capped_choice_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="4 experts x 4 places are more than 8 tokens x most=1"):
        expert_choice_capped(plain_input(jnp.zeros((8, 4))), k=2, most=1)


# Who leaks.


@pytest.mark.parametrize("name", ["base", "sinkhorn", "token_rounding"])
def test_training_compares_tokens_and_evaluation_does_not(name: str) -> None:
    assert not dependence(MoeOptions(make_router(name)), 6).causal  # 18 tokens a sequence
    assert dependence(MoeOptions(make_router(name)), 4, training=False).causal


def test_capped_choice_compares_tokens_in_evaluation_too() -> None:
    assert not dependence(MoeOptions(make_router("expert_choice_capped")), 4, training=False).causal
