"""ReMoE by hand: the loss, the strength that steers to k experts, and who loses a full expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.causality import dependence
from moejax.dispatch import make_plan
from moejax.moe import MoeOptions
from moejax.routing import LayerSize, MoeStats, combine_TE, make_router, moe_stats
from moejax.routing.balance import active_l1
from moejax.routing.remoe import remoe, update_strength
from moejax.routing.token_choice import topk
from tests.dispatch.plans import plain_input, plan_with
from tests.oracle import case, check

LOGITS_TE = jnp.asarray([[2.0, -1.0, 1.0, 0.0], [-1.0, -2.0, 3.0, -0.5], [-1.0, -1.0, -1.0, -1.0]])


def stats_of(logits_TE, state=None, k: int = 2) -> MoeStats:
    r = plain_input(logits_TE, state=state)
    routing = remoe(r, k=k)
    return moe_stats(r, routing, make_plan(routing, None))


def layers(*logits: jax.Array) -> MoeStats:
    return jax.tree.map(lambda *a: jnp.stack(a), *(stats_of(logits_TE) for logits_TE in logits))


def test_a_token_has_the_experts_whose_logit_is_above_0() -> None:
    routing = remoe(plain_input(LOGITS_TE))
    want_TE = [[2.0, 0, 1.0, 0], [0, 0, 3.0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(combine_TE(routing), want_TE)
    stats = stats_of(LOGITS_TE)
    assert stats.load_E.tolist() == [1, 0, 2, 0] and stats.first_E.tolist() == [1, 0, 1, 0]
    assert int(stats.left_behind) == 1  # the third token has no expert


def test_loss_is_the_papers() -> None:
    found = case("loss_definitions/relu_l1")
    logits_TE = jnp.asarray(found["inputs"]["logits_LTE"][0], jnp.float32)
    stats = stats_of(logits_TE, k=found["inputs"]["K"])
    check(found, "l1_layer0", active_l1(stats))
    check(found, "sparsity_layer0", 1 - stats.load_E.sum() / logits_TE.size)


def test_loss_by_hand_scales_with_the_strength_and_spares_the_idle() -> None:
    # f = 4 / (2 x 3) (1, 0, 2, 0); sum_t relu = (2, 0, 4, 0), mean over 3 tokens:
    # 4 / 18 (2 + 8) = 20 / 9. Padding counts in neither.
    assert active_l1(stats_of(LOGITS_TE)) == pytest.approx(20 / 9)
    assert active_l1(stats_of(LOGITS_TE, jnp.asarray(1e-8))) == pytest.approx(20e-8 / 9, rel=1e-5)
    r = plain_input(jnp.vstack([LOGITS_TE, 9.0 * jnp.ones((1, 4))]), valid_T=jnp.arange(4) < 3)
    routing = remoe(r)
    padded = moe_stats(r, routing, make_plan(routing, None))
    assert active_l1(padded) == pytest.approx(20 / 9)
    # d / d logit = f_e / 3 where it is above 0: (2 / 3, 4 / 3) / 3.
    gradient_TE = jax.grad(lambda a: active_l1(stats_of(a)))(LOGITS_TE)
    want_TE = np.asarray([[2, 0, 4, 0], [0, 0, 4, 0], [0, 0, 0, 0]]) / 9
    np.testing.assert_allclose(gradient_TE, want_TE, rtol=1e-6)


def test_strength_rises_while_too_many_are_active_in_all_layers_together() -> None:
    init, update = (getattr(make_router("remoe"), part) for part in ("init", "update"))
    strength_L = jnp.broadcast_to(init(LayerSize(4)), (2,))
    assert strength_L.dtype == jnp.float32 and strength_L.tolist() == pytest.approx([1e-8] * 2)
    all_TE, none_TE = jnp.ones((3, 4)), -jnp.ones((3, 4))
    # 12 of 24 pairs are active, the target is 2 / 4: as it should be, though neither layer is.
    still_L = update(strength_L, layers(all_TE, none_TE))
    np.testing.assert_array_equal(still_L, strength_L)
    # 12 + 3 of 24 > 1 / 2: up in both layers; 3 of 24: down.
    np.testing.assert_allclose(update(strength_L, layers(all_TE, LOGITS_TE)), 1.2e-8, rtol=1e-6)
    down_L = update(strength_L, layers(none_TE, LOGITS_TE))
    np.testing.assert_allclose(down_L, 1e-8 / 1.2, rtol=1e-6)
    # k = E: nothing is ever too much.
    np.testing.assert_array_equal(
        update_strength(strength_L, layers(all_TE, all_TE), k=4), strength_L
    )
    # A batch of padding says nothing.
    empty = jax.tree.map(jnp.zeros_like, layers(all_TE, all_TE))
    np.testing.assert_array_equal(update(strength_L, empty), strength_L)


def test_who_goes_first_when_an_expert_is_full() -> None:
    # Two slots. token-major: t0 has 0 and 1, t1 has 0 and 1, both are full: t2 has none.
    # k-major: the strongest first: t0e0, t1e1, t2e1, then t0e1 is refused, t1e0 fits, t2e0 not.
    logits_TE = jnp.asarray([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])

    def kept(order: str) -> list[list[int]]:
        plan = plan_with(remoe(plain_input(logits_TE), order=order), room=2)
        return sorted(
            [int(t), int(e)] for t, e in zip(plan.token_N, plan.expert_N, strict=True) if e < 2
        )

    assert kept("token_major") == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert kept("k_major") == [[0, 0], [1, 0], [1, 1], [2, 1]]


def test_a_loss_without_its_sum_says_whose_it_is() -> None:
    r = plain_input(LOGITS_TE)
    routing = topk(r)
    with pytest.raises(ValueError, match="active_l1 needs the router's own sum 'l1_E'; .* none"):
        active_l1(moe_stats(r, routing, make_plan(routing, None)))
    with pytest.raises(ValueError, match="need 1 <= k <= 4 experts, got k=5"):
        remoe(r, k=5)


@pytest.mark.parametrize(("order", "causal"), [("token_major", True), ("k_major", False)])
def test_full_experts_and_the_future(order: str, causal: bool) -> None:
    options = MoeOptions(make_router("remoe", {"order": order}), capacity_factor=0.3)
    assert dependence(options, 4).causal is causal
