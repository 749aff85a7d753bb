"""A bias that selects and never weighs, and the rules that move it, by hand and by other projects'
numbers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import LayerSize, combine_TE, make_router
from moejax.routing.loss_free import RULES, loss_free, updated_bias
from tests.dispatch.plans import plain_input
from tests.oracle import case, check

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
    got_E = updated_bias(
        jnp.asarray([0.5, 0.5, 0.5, 0.5]), jnp.asarray([2, 6, 7, 9]), bias_rate=0.01
    )
    np.testing.assert_allclose(got_E, [0.51, 0.5, 0.49, 0.49], rtol=1e-6)


N_E = jnp.asarray([2, 6, 7, 9])


@pytest.mark.parametrize(
    ("rule", "start", "step_E"),
    [
        # n = (2, 6, 7, 9), mean 6. Differences over the mean: (.667, 0, -.167, -.5).
        ("sign", 0.0, (1, 0, -1, -1)),
        ("multiplicative", 1.0, (1, 0, -1, -1)),
        ("proportional", 0.0, (2 / 3, 0, -1 / 6, -1 / 2)),
        # The signs' mean is -1/4.
        ("sign_centred", 0.0, (1.25, 0.25, -0.75, -0.75)),
        ("proportional_centred", 0.0, (2 / 3, 0, -1 / 6, -1 / 2)),
    ],
)
def test_rules_by_hand(rule: str, start: float, step_E) -> None:
    router = make_router("loss_free", {"rule": rule, "bias_rate": 0.01})
    bias_E = router.init(LayerSize(4))
    assert bias_E.tolist() == [start] * 4
    (got_E,) = router.update(bias_E[None], types.SimpleNamespace(load_E=N_E[None]))
    np.testing.assert_allclose(got_E, start + 0.01 * np.asarray(step_E), atol=1e-7)


def test_centred_bias_has_the_mean_zero_wherever_it_came_from() -> None:
    for rule in ("sign_centred", "proportional_centred"):
        bias_LE = updated_bias(jnp.asarray([[0.5, 0.1, 0.2, 0.0]] * 2), N_E[None], rule=rule)
        np.testing.assert_allclose(bias_LE.mean(-1), 0.0, atol=1e-7)


def test_a_multiplicative_bias_scales_the_scores_that_choose() -> None:
    # s b = (.9 x .5, .8, .1 x 9, .2) = (.45, .8, .9, .2): experts 2 and 1, weights s.
    r = plain_input(LOGIT_E, state=jnp.asarray([0.5, 1.0, 9.0, 1.0]))
    routing = loss_free(r, rule="multiplicative")
    assert routing.expert_N.tolist() == [2, 1]
    np.testing.assert_allclose(combine_TE(routing), [[0.0, 0.8, 0.1, 0.0]], rtol=1e-5)


def test_softmax_scores() -> None:
    # softmax(log s) = s / 2: (.45, .4, .05, .1); with the bias (-.15, .4, .35, .1).
    r = plain_input(jnp.log(S_E), state=B_E)
    weight_TE = combine_TE(loss_free(r, score="softmax"))
    np.testing.assert_allclose(weight_TE, [[0.0, 0.4, 0.05, 0.0]], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1, "renormalise": True}, "k=1 cannot be renormalised"),
        ({"score": "tanh"}, "unknown score='tanh': use one of sigmoid, softmax"),
        ({"rule": "signs"}, "unknown rule='signs': use one of sign, proportional, multi"),
    ],
)
def test_what_loss_free_does_not_do_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_free(plain_input(LOGIT_E), **options)


def test_sign_update_as_in_maxtext() -> None:
    found = case("bias_updates/maxtext_bias_update")
    expert_N = np.asarray(found["inputs"]["experts_BSK"]).reshape(-1)
    load_E = np.bincount(expert_N, minlength=found["inputs"]["E"])
    check(found, "load_E", load_E)
    check(found, "step_E", updated_bias(jnp.zeros(4), jnp.asarray(load_E), bias_rate=0.01))


def test_sign_update_with_and_without_centring() -> None:
    found = case("bias_updates/sign_step_with_and_without_centring")
    logits_TE = jnp.asarray(found["inputs"]["logits_LTE"][0])
    routing = loss_free(plain_input(logits_TE))
    load_E = jnp.bincount(routing.expert_N, length=4)
    check(found, "load_E", load_E)
    rate = found["inputs"]["rate"]
    for key, rule in (("not_centred_E", "sign"), ("centred_E", "sign_centred")):
        check(found, key, updated_bias(jnp.zeros(4), load_E, bias_rate=rate, rule=rule))


@pytest.mark.parametrize(
    ("rule", "score", "rate"),
    [(rule, "sigmoid", 0.02) for rule in RULES] + [("proportional", "softmax", 0.01)],
)
def test_loss_free_balances_a_skewed_batch(rule: str, score: str, rate: float) -> None:
    # Expert 0 is everybody's favourite by far; 100 steps of .02 let the others catch up.
    router = make_router("loss_free", {"rule": rule, "score": score, "bias_rate": rate})
    logits_TE = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    logits_TE = logits_TE.at[:, 0].add(2.0)

    def step(bias_E: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        routing = router.route(plain_input(logits_TE, state=bias_E))
        load_E = jnp.zeros(8, jnp.int32).at[routing.expert_N].add(1)
        return router.update(bias_E, types.SimpleNamespace(load_E=load_E)), load_E

    bias_E, load_XE = jax.lax.scan(step, router.init(LayerSize(8)), length=100)
    assert int(load_XE[0].max()) > 50  # mean 16
    assert int(load_XE[-1].max()) <= 20
    if rule == "sign":
        assert np.abs(bias_E).max() <= 100 * 0.02 + 1e-6
