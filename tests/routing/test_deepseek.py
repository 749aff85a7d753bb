"""Groups of experts by hand, DeepSeek's losses at and off balance, and what V3's bias decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import make_plan
from moejax.routing import MoeStats, RouterInput, combine_TE, make_router, moe_stats
from moejax.routing.balance import BALANCE_LOSSES
from moejax.routing.deepseek import deepseek_moe, deepseek_v2, deepseek_v3
from moejax.routing.loss_free import loss_free
from moejax.routing.token_choice import topk
from tests.dispatch.plans import plain_input
from tests.oracle import case, check

RANDOM = np.random.default_rng(0)
LOGITS_TE = jnp.asarray(RANDOM.normal(size=(12, 8)), jnp.float32)
BIAS_E = jnp.asarray(RANDOM.normal(size=8, scale=0.2), jnp.float32)


def logits_of(*scores_E: float) -> jax.Array:
    """Those of which the sigmoid is scores_E."""
    s_TE = jnp.asarray([scores_E])
    return jnp.log(s_TE / (1 - s_TE))


def stats_of(r: RouterInput, router, sequences: int = 1, **options: object) -> MoeStats:
    def run(r: RouterInput) -> MoeStats:
        routing = router(r, **options)
        return moe_stats(r, routing, make_plan(routing, None), None, sequences)

    return jax.jit(run)(r)


def test_without_a_limit_they_are_topk_and_loss_free() -> None:
    r = plain_input(LOGITS_TE)
    want_TE = combine_TE(topk(r, k=3))
    np.testing.assert_array_equal(combine_TE(deepseek_moe(r, k=3, expert_groups=4)), want_TE)
    unlimited = deepseek_v2(r, k=3, expert_groups=4, top_groups=4, route_scale=16.0)
    np.testing.assert_allclose(combine_TE(unlimited), 16 * want_TE, rtol=1e-6)
    biased = r._replace(state=BIAS_E)
    v3_TE = combine_TE(deepseek_v3(biased, k=3, expert_groups=4, top_groups=4))
    want_TE = combine_TE(loss_free(biased, k=3, renormalise=True))
    np.testing.assert_allclose(v3_TE, 2.5 * want_TE, rtol=1e-6)
    assert np.any((want_TE > 0) != (combine_TE(loss_free(r, k=3)) > 0))  # the bias takes part


def test_the_best_expert_or_the_best_pair_makes_a_group() -> None:
    # s = (.9, .1 | .6, .5), one group of two, K = 2. V2: max .9 > .6: experts 0, 1.
    # V3: .9 + .1 = 1 < 1.1: experts 2, 3, with the weights 2.5 x .6 / 1.1 and 2.5 x .5 / 1.1.
    groups = {"k": 2, "expert_groups": 2, "top_groups": 1}
    s_TE = jnp.asarray([[0.9, 0.1, 0.6, 0.5]])
    v2_TE = combine_TE(deepseek_v2(plain_input(jnp.log(s_TE)), **groups, route_scale=2.1))
    np.testing.assert_allclose(v2_TE, [[0.9, 0.1, 0.0, 0.0]], rtol=1e-5)  # softmax: s / 2.1
    r = plain_input(logits_of(0.9, 0.1, 0.6, 0.5))
    v3_TE = combine_TE(deepseek_v3(r, **groups))
    np.testing.assert_allclose(v3_TE, [[0.0, 0.0, 1.5 / 1.1, 1.25 / 1.1]], rtol=1e-5)
    # With a bias of .2 on expert 1 the first pair is worth 1.2; its weights are those of s.
    r = r._replace(state=jnp.asarray([0.0, 0.2, 0.0, 0.0]))
    np.testing.assert_allclose(
        combine_TE(deepseek_v3(r, **groups)), [[2.25, 0.25, 0.0, 0.0]], rtol=1e-5
    )


def test_groups_limit_what_a_token_may_choose() -> None:
    # Two of four groups of two, K = 3: by loops.
    r = plain_input(LOGITS_TE)
    got_TE = np.asarray(combine_TE(deepseek_v2(r, k=3, expert_groups=4, top_groups=2)))
    probs_TE = np.asarray(jax.nn.softmax(LOGITS_TE))
    for got_E, probs_E in zip(got_TE, probs_TE, strict=True):
        open_M = np.argsort(-probs_E.reshape(4, 2).max(1))[:2]
        allowed = [e for e in range(8) if e // 2 in open_M]
        best = sorted(allowed, key=lambda e: -probs_E[e])[:3]
        assert sorted(np.flatnonzero(got_E)) == sorted(best)
        np.testing.assert_allclose(got_E[best], probs_E[best], rtol=1e-6)
    assert np.any((got_TE > 0) != (np.asarray(combine_TE(topk(r, k=3))) > 0))


def test_v3_bias_selects_and_never_weighs() -> None:
    # s + b = (.3, .8, .4, .2): experts 1 and 2; weights 2.5 x .8 / .9 and 2.5 x .1 / .9.
    r = plain_input(logits_of(0.9, 0.8, 0.1, 0.2), state=jnp.asarray([-0.6, 0.0, 0.3, 0.0]))
    want_TE = 2.5 * np.asarray([[0.0, 0.8889, 0.1111, 0.0]])
    np.testing.assert_allclose(combine_TE(deepseek_v3(r)), want_TE, atol=1e-3)
    by_bias = jax.jacrev(lambda b_E: combine_TE(deepseek_v3(r._replace(state=b_E))))(r.state)
    assert not np.any(by_bias)


def test_a_biased_score_below_zero_beats_a_closed_group() -> None:
    # s + b = (-.9, -.8 | -.95, -.94): group 0 is open, and 0 for the closed one would win.
    r = plain_input(logits_of(0.1, 0.2, 0.05, 0.06), state=-jnp.ones(4))
    routing = deepseek_v3(r, expert_groups=2)
    assert sorted(routing.expert_N.tolist()) == [0, 1]


def test_v3_update_is_the_sign_of_the_error() -> None:
    router = make_router("deepseek_v3", {"bias_rate": 0.01})
    stats = stats_of(plain_input(jnp.zeros((4, 4))), deepseek_v3)  # all to experts 0 and 1
    bias_LE = router.update(jnp.zeros((1, 4)), jax.tree.map(lambda a: a[None], stats))
    np.testing.assert_allclose(bias_LE, [[-0.01, -0.01, 0.01, 0.01]])


def test_device_loss_by_hand() -> None:
    # Two tokens, K = 1, devices (0, 1) and (2, 3). p = (.4, .3, .2, .1), (.6, .1, .2, .1):
    # both choose expert 0. P of its device = (.7 + .7) / 2, mean of E f over it = 4 x (1 + 0) / 2:
    # 2 x .7 + 0 x .3 = 1.4.
    logits_TE = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1], [0.6, 0.1, 0.2, 0.1]]))
    stats = stats_of(plain_input(logits_TE), deepseek_moe, k=1, expert_groups=2)
    assert BALANCE_LOSSES["device"](stats) == pytest.approx(1.4)
    # One expert a device: the loss over experts, 4 x 1 x (.4 + .6) / 2 = 2. One device: always 1.
    alone = stats_of(plain_input(logits_TE), deepseek_moe, k=1, expert_groups=4)
    for name, found in (("device", alone), ("load_balance", stats)):
        assert BALANCE_LOSSES[name](found) == pytest.approx(2.0)
    one = stats_of(plain_input(logits_TE), deepseek_moe, k=1)
    assert BALANCE_LOSSES["device"](one) == pytest.approx(1.0)


def test_communication_loss_counts_a_token_once_for_each_group() -> None:
    # Three tokens, E = 4 in two groups, K = 2, M = 2. Token 0: experts 0, 1, one group. Token 1:
    # experts 0, 2, both groups. Token 2: padding. sent = (2, 1); f'' = 2 (2, 1) / (2 x 2).
    # P of group 0 = (.8 + .6) / 2 = .7: 1 x .7 + .5 x .3 = .85.
    probs_TE = jnp.asarray([[0.5, 0.3, 0.1, 0.1], [0.5, 0.1, 0.3, 0.1], [0.1, 0.1, 0.4, 0.4]])
    r = RouterInput(jnp.log(probs_TE), jnp.asarray([True, True, False]))
    stats = stats_of(r, deepseek_v2, expert_groups=2, top_groups=2)
    np.testing.assert_allclose(stats.own["sent_G"], [1.0, 0.5])  # over M
    assert BALANCE_LOSSES["communication"](stats) == pytest.approx(0.85)


@pytest.mark.parametrize("top_groups", [1, 2])
def test_losses_are_one_at_balance(top_groups: int) -> None:
    # Tokens choose (0, 1) and (2, 3), one group each; or (0, 2) and (1, 3), both groups.
    pairs = {1: [[4, 3, 0, 0], [0, 0, 4, 3]], 2: [[4, 0, 3, 0], [0, 4, 0, 3]]}[top_groups]
    stats = stats_of(
        plain_input(jnp.asarray(pairs)), deepseek_v2, expert_groups=2, top_groups=top_groups
    )
    for name in ("device", "communication"):
        assert BALANCE_LOSSES[name](stats) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["device", "communication"])
def test_losses_of_devices_push_down_the_busiest(name: str) -> None:
    def loss(logits_TE: jax.Array) -> jax.Array:
        stats = stats_of(plain_input(logits_TE), deepseek_v2, expert_groups=4, top_groups=2, k=2)
        return BALANCE_LOSSES[name](stats)

    gradient_TE = jax.grad(loss)(LOGITS_TE.at[:, 4:6].add(2.0))
    by_group_G = gradient_TE.reshape(12, 4, 2).sum((0, 2))
    assert by_group_G.argmax() == 2 and by_group_G[2] > 0.01


def test_sequence_loss_is_of_each_sequence() -> None:
    # Two sequences, each all on its own expert (E = 2): 2 each; 1 over the batch.
    logits_TE = jnp.asarray([[50.0, 0.0]] * 3 + [[0.0, 50.0]] * 3)
    stats = stats_of(plain_input(logits_TE), deepseek_moe, 2, k=1)
    assert BALANCE_LOSSES["load_balance_sequence"](stats) == pytest.approx(2.0)
    assert BALANCE_LOSSES["load_balance"](stats) == pytest.approx(1.0)
    # A sequence of padding is none.
    r = RouterInput(logits_TE, jnp.arange(6) < 3)
    padded = stats_of(r, deepseek_moe, 2, k=1)
    assert BALANCE_LOSSES["load_balance_sequence"](padded) == pytest.approx(2.0)
    found = case("loss_definitions/per_sequence")
    r = plain_input(jnp.asarray(found["inputs"]["logits_LTE"][0]))
    check(found, "layer0", BALANCE_LOSSES["load_balance_sequence"](stats_of(r, deepseek_moe, 2)))


def test_sequence_loss_knows_no_bias_and_no_groups() -> None:
    plain = stats_of(plain_input(LOGITS_TE), deepseek_v3, 3)
    r = plain_input(LOGITS_TE, state=5 * BIAS_E)
    limited = stats_of(r, deepseek_v3, 3, expert_groups=4, top_groups=1)
    values = [BALANCE_LOSSES["load_balance_sequence"](stats) for stats in (plain, limited)]
    assert values[0] == values[1] and np.any(plain.load_E != limited.load_E)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_groups": 3}, "8 experts are not divisible by expert_groups=3"),
        ({"expert_groups": 4, "top_groups": 5}, "top_groups=5 must be from 1 to expert_groups=4"),
        ({"expert_groups": 4, "top_groups": 0}, "top_groups=0 must be"),
        ({"k": 3, "expert_groups": 4}, "k=3 experts do not fit into top_groups=1 groups of 2"),
    ],
)
@pytest.mark.parametrize("router", [deepseek_v2, deepseek_v3])
def test_groups_that_cannot_be_are_refused(router, options, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        router(plain_input(LOGITS_TE), **options)
    assert "\n" not in str(caught.value) and router.__name__ in str(caught.value)


def test_v3_refuses_one_expert_and_losses_their_missing_sums() -> None:
    with pytest.raises(ValueError, match="deepseek_v3 with k=1"):
        deepseek_v3(plain_input(LOGITS_TE), k=1)
    stats = stats_of(plain_input(LOGITS_TE), topk)
    for name in ("device", "communication"):
        with pytest.raises(ValueError, match=f"balance.{name} needs the router's own sum 'sent"):
            BALANCE_LOSSES[name](stats)
