"""Token choice by hand: gates, gradients, GShard's coin, a bias that selects and never weighs."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import make_plan
from moejax.routing import LayerSize, combine_TE, make_router
from moejax.routing.token_choice import gshard_top2, loss_free, sign_update, switch, topk
from tests.dispatch.plans import plain_input
from tests.oracle import case, check


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


S_E = jnp.asarray([[0.9, 0.8, 0.1, 0.2]])
LOGIT_E = jnp.log(S_E / (1 - S_E))
B_E = jnp.asarray([-0.6, 0.0, 0.3, 0.0])


def test_loss_free_bias_selects_and_never_weighs() -> None:
    # s + b = (.3, .8, .4, .2): experts 1 and 2, with the weights s = .8, .1; renormalised / .9.
    r = plain_input(LOGIT_E, state=B_E)
    np.testing.assert_allclose(combine_TE(loss_free(r)), [[0.0, 0.8, 0.1, 0.0]], rtol=1e-5)
    renormalised_TE = combine_TE(loss_free(r, renormalise=True))
    np.testing.assert_allclose(renormalised_TE, [[0.0, 8 / 9, 1 / 9, 0.0]], rtol=1e-5)
    np.testing.assert_allclose(
        combine_TE(loss_free(plain_input(LOGIT_E))), [[0.9, 0.8, 0.0, 0.0]], rtol=1e-5
    )


def test_loss_free_bias_has_no_gradient_and_no_effect_on_a_kept_set() -> None:
    def weights(bias_E: jax.Array) -> jax.Array:
        return combine_TE(loss_free(plain_input(LOGIT_E, state=bias_E), renormalise=True))

    assert not np.any(jax.jacobian(weights)(B_E))
    # (.25, .75, .45, .15) still picks 1 and 2: bit for bit the same weights.
    nudged_E = B_E + jnp.asarray([-0.05, -0.05, 0.05, -0.05])
    np.testing.assert_array_equal(weights(nudged_E), weights(B_E))


def test_sign_update_by_hand() -> None:
    # n = (2, 6, 7, 9), mean 6: (+, 0, -, -) u, added to what was there.
    got_E = sign_update(
        jnp.asarray([0.5, 0.5, 0.5, 0.5]), jnp.asarray([2, 6, 7, 9]), bias_rate=0.01
    )
    np.testing.assert_allclose(got_E, [0.51, 0.5, 0.49, 0.49], rtol=1e-6)


def test_sign_update_as_in_maxtext() -> None:
    found = case("bias_updates/maxtext_bias_update")
    expert_N = np.asarray(found["inputs"]["experts_BSK"]).reshape(-1)
    load_E = np.bincount(expert_N, minlength=found["inputs"]["E"])
    check(found, "load_E", load_E)
    check(found, "step_E", sign_update(jnp.zeros(4), jnp.asarray(load_E), bias_rate=0.01))


def test_sign_update_is_not_centred() -> None:
    found = case("bias_updates/sign_step_with_and_without_centring")
    logits_TE = jnp.asarray(found["inputs"]["logits_LTE"][0])
    routing = loss_free(plain_input(logits_TE))
    load_E = jnp.bincount(routing.expert_N, length=4)
    check(found, "load_E", load_E)
    check(
        found, "not_centred_E", sign_update(jnp.zeros(4), load_E, bias_rate=found["inputs"]["rate"])
    )


def test_loss_free_balances_a_skewed_batch() -> None:
    # Expert 0 is everybody's favourite by far; 100 steps of .02 let the others catch up.
    router = make_router("loss_free", {"k": 2, "bias_rate": 0.02})
    logits_TE = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    logits_TE = logits_TE.at[:, 0].add(2.0)

    def step(bias_E: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        routing = router.route(plain_input(logits_TE, state=bias_E))
        load_E = jnp.zeros(8, jnp.int32).at[routing.expert_N].add(1)
        return router.update(bias_E, types.SimpleNamespace(load_E=load_E)), load_E

    bias_E, load_XE = jax.lax.scan(step, router.init(LayerSize(8)), length=100)
    assert int(load_XE[0].max()) > 50  # mean 16
    assert int(load_XE[-1].max()) <= 20
    assert np.abs(bias_E).max() <= 100 * 0.02 + 1e-6
