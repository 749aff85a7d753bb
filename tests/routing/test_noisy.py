"""Noisy top-k: the probability of being chosen, two levels by loops, V-MoE's own definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import make_plan
from moejax.routing import (
    MoeStats,
    RouterInput,
    Routing,
    combine_TE,
    moe_stats,
    token_noise,
)
from moejax.routing.balance import BALANCE_LOSSES, squared_cv
from moejax.routing.noisy import (
    ROUTERS,
    chance_above,
    chance_of_choice,
    hierarchical,
    noisy_topk,
    vmoe,
)
from moejax.routing.token_choice import topk
from tests.dispatch.plans import kept_rows, plain_input, plan_with
from tests.oracle import case, check

RANDOM = np.random.default_rng(0)
KEY = jax.random.key(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


@jax.jit
def stats_of(r: RouterInput, routing: Routing) -> MoeStats:
    return moe_stats(r, routing, make_plan(routing, None))


def test_chance_by_hand() -> None:
    # K = 1. Expert 0: Phi((1 - .2) / 1) = Phi(.8) = .7881; expert 1: Phi((0 - .5) / 1) = .3085.
    one = jnp.ones((1, 2))
    got = chance_of_choice(jnp.asarray([[1.0, 0.0]]), jnp.asarray([[0.5, 0.2]]), one, 1)
    np.testing.assert_allclose(got, [[0.7881446, 0.3085375]], atol=1e-6)
    assert chance_of_choice(one, one, one, 2).tolist() == [[1.0, 1.0]]  # both are always chosen


def test_chance_is_how_often_new_noise_chooses_the_expert() -> None:
    logits_TE, std_TE = normal(3, 5), jnp.abs(normal(3, 5)) + 0.3
    noisy_TE = logits_TE + std_TE * normal(3, 5)
    chance_TE = chance_of_choice(logits_TE, noisy_TE, std_TE, 2)
    for expert in range(5):
        new_XT = np.asarray(logits_TE)[:, expert] + np.asarray(std_TE)[:, expert] * RANDOM.normal(
            size=(8192, 3)
        )
        others_TE = np.sort(np.delete(np.asarray(noisy_TE), expert, axis=1))
        often_T = (new_XT > others_TE[:, -2]).mean(0)
        # 4 sd of a mean of 8,192 coins are .022.
        np.testing.assert_allclose(chance_TE[:, expert], often_T, atol=0.022)


def test_noise_at_the_start_has_scale_ln_2() -> None:
    weights = ROUTERS["noisy_topk"].weights
    assert weights is not None and not np.any(weights(KEY, (8, 4)))
    # All projections 0, K = E = 2: log(w0 / w1) = |h0 - h1|, of standard deviation sqrt(2) ln 2.
    routing = noisy_topk(
        plain_input(jnp.zeros((20000, 2)), key=KEY, extra_TX=jnp.zeros((20000, 2)))
    )
    log_TE = np.log(combine_TE(routing))
    assert np.std(log_TE[:, 0] - log_TE[:, 1]) == pytest.approx(2**0.5 * np.log(2), rel=0.02)


def test_weights_importance_and_load_in_training() -> None:
    valid_T = jnp.arange(9) != 4
    r = RouterInput(normal(9, 5), valid_T, KEY, extra_TX=normal(9, 5))
    routing = noisy_topk(r, k=3)
    std_TE = np.log1p(np.exp(r.extra_TX))
    noisy_TE = np.asarray(
        r.logits_TE + token_noise(r, lambda key: jax.random.normal(key, (5,))) * std_TE
    )
    load_E, importance_E = np.zeros(5), np.zeros(5)
    for t in np.flatnonzero(valid_T):
        best = np.argsort(-noisy_TE[t])[:3]
        weight_K = np.exp(noisy_TE[t, best]) / np.exp(noisy_TE[t, best]).sum()
        np.testing.assert_allclose(combine_TE(routing)[t, best], weight_K, rtol=1e-5)
        importance_E[best] += weight_K
        for e in range(5):
            kth = np.sort(np.delete(noisy_TE[t], e))[-3]
            z = (float(r.logits_TE[t, e]) - kth) / std_TE[t, e]
            load_E[e] += 0.5 * math.erfc(-z / math.sqrt(2))
    np.testing.assert_allclose(routing.sums["importance_E"], importance_E, rtol=1e-5)
    np.testing.assert_allclose(routing.sums["load_E"], load_E, rtol=1e-4)
    stats = stats_of(r, routing)
    for name, amount_E in (("importance", importance_E), ("load", load_E)):
        want = amount_E.var() / amount_E.mean() ** 2
        assert BALANCE_LOSSES[name](stats) == pytest.approx(want, rel=1e-4)


def test_losses_push_down_the_busiest_expert_and_reach_the_noise() -> None:
    logits_TE = normal(64, 4).at[:, 2].add(1.0)

    def loss(logits_TE, extra_TX, name):
        r = plain_input(logits_TE, key=KEY, extra_TX=extra_TX)
        return BALANCE_LOSSES[name](stats_of(r, noisy_topk(r)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    for name in ("importance", "load"):
        by_logits_TE, by_scale_TE = gradient(logits_TE, jnp.zeros((64, 4)), name)
        assert by_logits_TE.sum(0).argmax() == 2 and by_logits_TE[:, 2].sum() > 0.01
        assert np.abs(by_scale_TE).max() > 1e-5


@pytest.mark.parametrize("router", [noisy_topk, hierarchical, vmoe])
def test_load_of_an_evaluation_is_a_count_without_gradient(router) -> None:
    columns = {noisy_topk: 6, hierarchical: 10, vmoe: 0}[router]

    @jax.jit
    def load_E(logits_TE):
        r = plain_input(logits_TE, extra_TX=jnp.sin(jnp.arange(7.0 * columns)).reshape(7, columns))
        routing = router(r)
        return routing.sums["load_E"], stats_of(r, routing).load_E

    logits_TE = normal(7, 6)
    np.testing.assert_array_equal(*load_E(logits_TE))
    assert not np.any(jax.jacrev(lambda a: load_E(a)[0])(logits_TE))


def test_a_scale_of_nothing_and_all_experts_chosen_stay_finite() -> None:
    def loss(extra_TX, k):
        r = plain_input(jnp.ones((8, 3)), key=KEY, extra_TX=extra_TX)
        stats = stats_of(r, noisy_topk(r, k=k))
        return BALANCE_LOSSES["load"](stats) + BALANCE_LOSSES["importance"](stats)

    for k in (2, 3):
        value, gradient_TX = jax.jit(jax.value_and_grad(loss), static_argnums=1)(
            jnp.full((8, 3), -200.0), k
        )
        assert np.isfinite(value) and np.all(np.isfinite(gradient_TX))


def two_levels(r: RouterInput, groups: int, top: int, second: int) -> np.ndarray:
    """The weights of `hierarchical` in evaluation, by loops."""
    size = r.logits_TE.shape[1] // groups
    weight_TE = np.zeros(r.logits_TE.shape)
    for t, logits_E in enumerate(np.asarray(r.logits_TE)):
        primary_G = np.asarray(r.extra_TX)[t, :groups]
        best_M = np.argsort(-primary_G)[:top]
        for g, weight in zip(best_M, np.asarray(jax.nn.softmax(primary_G[best_M])), strict=True):
            inner_E = logits_E[g * size : (g + 1) * size]
            best_K = np.argsort(-inner_E)[:second]
            weight_TE[t, g * size + best_K] = weight * jax.nn.softmax(inner_E[best_K])
    return weight_TE


def test_hierarchical_is_two_levels() -> None:
    r = plain_input(normal(6, 12), extra_TX=normal(6, 18))
    routing = hierarchical(r, k=4, expert_groups=3, top_groups=2)
    np.testing.assert_allclose(combine_TE(routing), two_levels(r, 3, 2, 2), atol=1e-6)
    weight_TK = routing.weight_N.reshape(4, 6).T
    assert np.all(np.diff(weight_TK, axis=1) <= 0)  # choices count from the best one
    np.testing.assert_allclose(weight_TK.sum(1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(routing.scores_TE.sum(1), 1.0, rtol=1e-6)


def test_hierarchical_load_is_formed_on_the_whole_batch() -> None:
    # Load_H = Load_primary,g x Load_g,e / tokens of the group; added up over two microbatches.
    inputs = [
        plain_input(normal(6, 12), extra_TX=normal(6, 18), key=jax.random.key(i)) for i in (1, 2)
    ]
    parts = [hierarchical(r, k=4, expert_groups=3) for r in inputs]
    own = {name: parts[0].sums[name] + parts[1].sums[name] for name in parts[0].sums}
    load_GE, sent_G = np.asarray(own["load_E"]).reshape(3, 4), np.asarray(own["sent_G"])
    assert sent_G.sum() == 24  # two groups for each of 12 tokens
    want_GE = np.asarray(own["load_G"])[:, None] * load_GE / sent_G[:, None]
    stats = stats_of(inputs[0], parts[0])._replace(own=own)
    want = want_GE.var() / want_GE.mean() ** 2
    assert BALANCE_LOSSES["load"](stats) == pytest.approx(want, rel=1e-5)
    # A token counts for its group's experts with their chances among two of four: they add up to
    # about 2, never to as much as 4.
    assert np.all(load_GE.sum(1) < 3 * sent_G) and np.all(load_GE.sum(1) > sent_G)
    weights_E = sum(np.asarray(combine_TE(part)).sum(0) for part in parts)
    np.testing.assert_allclose(own["importance_E"], weights_E, rtol=1e-5)


def test_hierarchical_load_trains_both_levels_and_all_noise() -> None:
    def loss(logits_TE, extra_TX):
        r = plain_input(logits_TE, extra_TX=extra_TX, key=KEY)
        return BALANCE_LOSSES["load"](stats_of(r, hierarchical(r, k=4, expert_groups=3)))

    by_logits_TE, by_extra_TX = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        normal(6, 12), normal(6, 18)
    )
    for part in (by_logits_TE, by_extra_TX[:, :3], by_extra_TX[:, 3:6], by_extra_TX[:, 6:]):
        assert np.abs(part).max() > 1e-5


GATES_TE = jnp.asarray(case("balance_losses/vmoe_losses")["inputs"]["gates_TE"])


def test_importance_and_load_of_vmoe() -> None:
    found = case("balance_losses/vmoe_losses")
    r = plain_input(jnp.log(jnp.maximum(GATES_TE, 1e-30)))
    check(found, "importance", BALANCE_LOSSES["importance"](stats_of(r, vmoe(r))))
    given = found["inputs"]
    logits_TE, noise_TE = (jnp.asarray(given[key]) for key in ("load_logits_TE", "load_noise_TE"))
    chance_TE = chance_above(
        logits_TE, logits_TE + noise_TE, given["load_noise_std"], given["load_K"]
    )
    check(found, "load", squared_cv(chance_TE.mean(0)))


def test_vmoe_noise_moves_choices_and_weights_and_not_the_importance() -> None:
    logits_TE = normal(4000, 4)
    r = plain_input(logits_TE, key=KEY)
    routing = vmoe(r, k=4)
    probs_TE = jax.nn.softmax(logits_TE)
    np.testing.assert_allclose(routing.sums["importance_E"], probs_TE.sum(0), rtol=1e-5)
    np.testing.assert_allclose(routing.scores_TE, probs_TE, rtol=1e-6)
    moved_TE = jnp.log(combine_TE(routing)) - jnp.log(probs_TE)
    noise_TE = moved_TE - moved_TE.mean(1, keepdims=True)
    # Noise of standard deviation 1/4, less its mean over four experts: sqrt(3/4) / 4.
    assert np.std(noise_TE) == pytest.approx(0.75**0.5 / 4, rel=0.02)
    unit_TE = token_noise(r, lambda key: jax.random.normal(key, (4,)))
    np.testing.assert_allclose(
        vmoe(r).sums["load_E"],
        chance_above(logits_TE, logits_TE + unit_TE / 4, 0.25, 2).sum(0),
        rtol=1e-5,
    )


def test_priority_of_the_batch_by_hand() -> None:
    # Best weights .6, .8, .9, .7: served in the order t2, t1, t3, t0. Two slots an expert:
    # e0 takes t2, t1; e1 takes t3, then of the second choices the first in order, t2.
    r = plain_input(jnp.log(jnp.asarray([[0.6, 0.4], [0.8, 0.2], [0.9, 0.1], [0.3, 0.7]])))
    for routing in (vmoe(r, order="bpr"), topk(r, order="bpr")):
        rows = kept_rows(plan_with(routing, 2), 4, 2)
        assert [row[1:4] for row in rows] == [[1, 0, 1], [2, 0, 0], [2, 1, 1], [3, 1, 0]]


def test_priority_of_the_batch_drops_the_lightest_first() -> None:
    # Everybody wants expert 0 first: whatever the capacity, those kept weigh more than the rest.
    r = plain_input(normal(16, 4).at[:, 0].add(8.0))
    routing = vmoe(r, k=1, order="bpr")
    weight_T = np.asarray(combine_TE(routing)[:, 0])
    for room in (1, 3, 8, 15):
        kept = [row[1] for row in kept_rows(plan_with(routing, room), 16, 4)]
        assert sorted(kept) == sorted(np.argsort(-weight_T)[:room].tolist())


def test_padding_is_served_last() -> None:
    logits_TE = normal(8, 4)
    valid_T = jnp.arange(8) % 2 == 1
    routing = topk(RouterInput(logits_TE, valid_T), order="bpr")
    assert sorted(routing.token_N[:4].tolist()) == [1, 3, 5, 7]
    assert routing.expert_N[4:8].tolist() == [4] * 4


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        (noisy_topk, {"k": 1}, "noisy_topk with k=1"),
        (noisy_topk, {}, "needs 8 further projections in extra_TX, got 3"),
        (hierarchical, {"expert_groups": 3}, "8 / 3 and k / top_groups = 4 / 2 must be whole"),
        (hierarchical, {"k": 3}, "k / top_groups = 3 / 2 must be whole"),
        (hierarchical, {"k": 2}, "2 of 2 groups, 1 of their 4 experts; each level must choose 2"),
        (hierarchical, {"top_groups": 1}, "1 of 2 groups, 4 of their 4"),
        (vmoe, {"order": "best"}, "unknown order 'best'"),
    ],
)
def test_what_cannot_be_is_refused(router, options, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        router(plain_input(jnp.zeros((2, 8)), extra_TX=jnp.zeros((2, 3))), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["importance", "load"])
def test_a_loss_without_its_sum_is_refused(name: str) -> None:
    r = plain_input(jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=f"balance.{name} needs the router's own sum '{name}_E'"):
        BALANCE_LOSSES[name](stats_of(r, topk(r)))
