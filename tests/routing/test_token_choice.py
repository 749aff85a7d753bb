"""Token choice by hand: gates, gradients, GShard's coin, tokens with their own k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import make_plan
from moejax.routing import RouterInput, combine_TE, moe_stats
from moejax.routing.balance import BALANCE_LOSSES
from moejax.routing.token_choice import gshard_top2, switch, top_p, topk
from tests.dispatch.plans import plain_input


def logits_of(*probs_E: float) -> jax.Array:
    return jnp.log(jnp.asarray([probs_E]))


def test_gates_raw_and_renormalised() -> None:
    # p = (.5, .3, .2), K = 2: raw (.5, .3); renormalised .5/.8, .3/.8.
    r = plain_input(logits_of(0.5, 0.3, 0.2))
    np.testing.assert_allclose(combine_TE(topk(r)), [[0.5, 0.3, 0.0]], rtol=1e-6)
    renormalised_TE = combine_TE(topk(r, renormalise=True))
    np.testing.assert_allclose(renormalised_TE, [[0.625, 0.375, 0.0]], rtol=1e-6)


def test_renormalised_is_a_softmax_over_the_chosen_logits() -> None:
    logits_TE = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    routing = topk(plain_input(logits_TE), k=3, renormalise=True)
    best_TK = jax.lax.top_k(logits_TE, 3)[0]
    np.testing.assert_allclose(routing.weight_N.reshape(3, 6).T, jax.nn.softmax(best_TK), rtol=1e-5)


def test_switch_weight_and_gradient() -> None:
    # p = (.7, .2, .1): weight .7; d p0 / d logits = p0 (1 - p0), -p0 p1, -p0 p2.
    logits_TE = logits_of(0.7, 0.2, 0.1)
    weight, gradient_TE = jax.value_and_grad(lambda a: switch(plain_input(a)).weight_N.sum())(
        logits_TE
    )
    assert weight == pytest.approx(0.7)
    np.testing.assert_allclose(gradient_TE, [[0.21, -0.14, -0.07]], atol=1e-6)


def test_top1_is_never_renormalised() -> None:
    r = plain_input(logits_of(0.7, 0.2, 0.1))
    with pytest.raises(ValueError, match="k=1 cannot be renormalised"):
        topk(r, k=1, renormalise=True)
    assert topk(r, k=1).weight_N.tolist() == pytest.approx([0.7])


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        (switch, {"k": 2}, "got k=2; use topk"),
        (gshard_top2, {"k": 3}, "got k=3; use topk"),
        (top_p, {"p": 0.0}, r"p=0.0 must be in \(0, 1\]"),
        (top_p, {"p": 1.5}, r"p=1.5 must be in \(0, 1\]"),
        (gshard_top2, {"second": "often"}, "unknown second='often': use 'random' or 'always'"),
    ],
)
def test_what_a_router_does_not_do_is_refused(router, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router(plain_input(jnp.zeros((2, 4))), **options)


def test_gshard_weights() -> None:
    # p = (.6, .3, .1): .6/.9 and .3/.9.
    routing = gshard_top2(plain_input(logits_of(0.6, 0.3, 0.1)))
    np.testing.assert_allclose(combine_TE(routing), [[2 / 3, 1 / 3, 0.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("probs_E", "kept"),
    [((0.6, 0.3, 0.1), 2 / 3), ((0.81, 0.09, 0.1), 0.2198), ((0.4, 0.4, 0.2), 1.0)],
)
def test_gshard_keeps_a_second_choice_with_twice_its_weight(probs_E, kept: float) -> None:
    # .3/.9 x 2 = 2/3; .1/.91 x 2 = .2198; .5 x 2 = 1. 64 keys x 64 tokens: sd of the share < .008.
    logits_TE = jnp.tile(logits_of(*probs_E), (64, 1))
    keys = jax.random.split(jax.random.key(0), 64)
    expert_XN = jax.vmap(lambda key: gshard_top2(plain_input(logits_TE, key=key)).expert_N)(keys)
    first, second = expert_XN[:, :64], expert_XN[:, 64:]
    assert len(np.unique(first)) == 1  # the coin never touches a first choice
    assert np.mean(np.asarray(second) < 3) == pytest.approx(kept, abs=0.032 if kept < 1 else 0)


def test_gshard_coin_falls_in_training_only() -> None:
    logits_TE = jnp.tile(logits_of(0.9, 0.06, 0.04), (64, 1))
    noisy, quiet = plain_input(logits_TE, key=jax.random.key(0)), plain_input(logits_TE)
    assert int((gshard_top2(noisy).expert_N == 3).sum()) > 32
    for routing in (gshard_top2(quiet), gshard_top2(noisy, second="always")):
        assert not np.any(routing.expert_N == 3)


def test_gshard_refused_by_the_coin_takes_no_slot_and_no_load() -> None:
    # 64 tokens want expert 0, then expert 1, whose 20 slots hold 20 of those that the coin passed.
    # With probability 2/3 about 43 pass: were the 21 refused counted, fewer than 20 would fit.
    logits_TE = jnp.tile(logits_of(0.6, 0.3, 0.1), (64, 1))
    routing = gshard_top2(plain_input(logits_TE, key=jax.random.key(1)))
    passed_T = np.asarray(routing.expert_N[64:]) == 1
    assert 30 < passed_T.sum() < 56 and not np.any(routing.weight_N[64:][~passed_T])
    plan = make_plan(routing, 20 * 3 / 128)
    assert plan.load_E.tolist() == [20, 20, 0]
    kept_T = np.asarray(plan.expert_N[64:]) == 1
    np.testing.assert_array_equal(np.flatnonzero(kept_T), np.flatnonzero(passed_T)[:20])


def test_top_p_takes_experts_until_their_mass_reaches_p() -> None:
    # p = (.5, .3, .15, .05). Before each choice: 0, .5, .8, .95 are reached.
    logits_TE = logits_of(0.5, 0.3, 0.15, 0.05)
    for p, count in ((0.4, 1), (0.55, 2), (0.79, 2), (0.81, 3), (0.97, 4), (1.0, 4)):
        weight_E = combine_TE(top_p(plain_input(logits_TE), p=p))[0]
        np.testing.assert_allclose(
            weight_E, np.where(np.arange(4) < count, [0.5, 0.3, 0.15, 0.05], 0.0), rtol=1e-6
        )
    capped_E = combine_TE(top_p(plain_input(logits_TE), p=0.97, k=2))[0]
    np.testing.assert_allclose(capped_E, [0.5, 0.3, 0.0, 0.0], rtol=1e-6)


def test_top_p_counts_what_each_token_took() -> None:
    # A sure token takes one expert, an unsure one three of probability .25; the third is padding.
    logits_TE = jnp.concatenate([logits_of(0.97, 0.01, 0.01, 0.01), jnp.zeros((2, 4))])
    r = RouterInput(logits_TE, jnp.asarray([True, True, False]))
    routing = top_p(r, p=0.7)
    stats = moe_stats(r, routing, make_plan(routing, None))
    assert stats.load_E.tolist() == [2, 1, 1, 0] and stats.first_E.tolist() == [2, 0, 0, 0]
    # Entropies: -.97 ln .97 - 3 x .01 ln .01 = .1677; ln 4 = 1.3863. Their mean is .7770.
    assert BALANCE_LOSSES["router_entropy"](stats) == pytest.approx(0.77700, abs=1e-5)


def test_router_entropy_makes_a_token_surer() -> None:
    def entropy(logits_TE: jax.Array) -> jax.Array:
        return top_p(plain_input(logits_TE), k=3).sums["entropy"]

    gradient_TE = jax.grad(entropy)(logits_of(0.7, 0.2, 0.1))
    # d H / d logits = -p (ln p + H), H = .8018: downhill, the best logit rises, all others fall.
    np.testing.assert_allclose(gradient_TE, [[-0.31161, 0.16152, 0.15007]], atol=2e-4)
