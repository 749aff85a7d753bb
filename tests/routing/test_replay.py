"""Replay: what is written down of a routing, and what another run makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import route
from moejax.routing import ROUTERS, LayerSize, Recorded, RouterInput, combine_TE, decisions
from moejax.routing.registry import make_router
from moejax.routing.replay import replay

TOKENS, EXPERTS = 12, 4
RANDOM = np.random.default_rng(5)
LOGITS_TE = jnp.asarray(RANDOM.normal(size=(TOKENS, EXPERTS)), jnp.float32)
OTHER_TE = jnp.asarray(RANDOM.normal(size=(TOKENS, EXPERTS)), jnp.float32)
SOME_T = jnp.asarray(RANDOM.random(TOKENS) < 0.7)


@functools.partial(jax.jit, static_argnums=0)
def recorded_and_replayed(name: str):
    """A router's routing without what is for the gradient alone, and its replay on other logits."""
    router = make_router(name)
    state = router.init(LayerSize(EXPERTS, 8, 256, jnp.ones(256)))
    columns = router.columns(EXPERTS)
    extra_TX = jnp.asarray(RANDOM.normal(size=(TOKENS, columns)), jnp.float32) if columns else None
    token_T = jnp.arange(TOKENS, dtype=jnp.int32)
    r = RouterInput(LOGITS_TE, SOME_T, jax.random.key(0), state, token_T, token_T, extra_TX)
    routing = route(router.route, r, 1, "batch")
    real_N = routing.choice_N >= 0
    chosen_N = jnp.where(real_N, routing.expert_N, EXPERTS)
    chosen = routing._replace(expert_N=chosen_N, weight_N=jnp.where(real_N, routing.weight_N, 0.0))
    kept_N = jnp.ones(routing.token_N.shape, bool)
    again = RouterInput(OTHER_TE, SOME_T, recorded=decisions(routing, kept_N).recorded)
    return combine_TE(chosen), combine_TE(route(replay, again, 1, "batch"))


@pytest.mark.parametrize("name", ROUTERS)
def test_every_routing_is_replayed_whatever_the_logits_say(name: str) -> None:
    routing_TE, replayed_TE = recorded_and_replayed(name)
    np.testing.assert_array_equal(replayed_TE, routing_TE)
    assert np.count_nonzero(routing_TE) > 3


# Two tokens of probabilities (.7, .2, .1): one to experts 1 and 2, one to expert 0 alone.
PROBS_TE = jnp.asarray([[0.7, 0.2, 0.1]] * 2)
KEPT = Recorded(jnp.asarray([[1, 2], [0, 3]]), jnp.asarray([[0.5, 0.25], [2.0, 0.0]]))


def weights(weight: str, logits_TE=None, valid_T=None) -> jax.Array:
    logits_TE = jnp.log(PROBS_TE) if logits_TE is None else logits_TE
    valid_T = jnp.ones(2, bool) if valid_T is None else valid_T
    return combine_TE(replay(RouterInput(logits_TE, valid_T, recorded=KEPT), weight=weight))


@pytest.mark.parametrize(
    ("weight", "want"),
    [
        ("recorded", [[0, 0.5, 0.25], [2, 0, 0]]),
        ("softmax", [[0, 0.2, 0.1], [0.7, 0, 0]]),
        ("softmax_renorm", [[0, 2 / 3, 1 / 3], [1, 0, 0]]),
        # sigmoid(log p) = p / (1 + p).
        ("sigmoid", [[0, 0.2 / 1.2, 0.1 / 1.1], [0.7 / 1.7, 0, 0]]),
    ],
)
def test_weights_by_hand(weight: str, want) -> None:
    np.testing.assert_allclose(weights(weight), np.asarray(want, np.float32), rtol=1e-6)
    padded = weights(weight, valid_T=jnp.asarray([True, False]))
    assert not np.any(padded[1]) and np.any(padded[0])


@pytest.mark.parametrize("weight", ["recorded", "softmax", "softmax_renorm", "sigmoid"])
def test_live_weights_have_a_gradient_and_recorded_ones_have_none(weight: str) -> None:
    def total(logits_TE):
        return (weights(weight, logits_TE) * jnp.asarray([[1.0, 2.0, 3.0]])).sum()

    size_T = np.abs(jax.grad(total)(jnp.log(PROBS_TE))).max(-1)
    assert (size_T[0] > 1e-2) == (weight != "recorded")
    # Renormalised over the one expert that it has, the second token's weight is the constant 1.
    assert (size_T[1] > 1e-2) == (weight in ("softmax", "sigmoid"))
    assert np.all(np.isfinite(size_T))


def test_where_nothing_is_recorded_the_router_chooses() -> None:
    r = RouterInput(LOGITS_TE, SOME_T)
    for weight, other in (("recorded", False), ("softmax", False), ("softmax_renorm", True)):
        ours = replay(r, k=3, weight=weight)
        theirs = make_router("topk", {"k": 3, "renormalise": other}).route(r)
        np.testing.assert_array_equal(combine_TE(ours), combine_TE(theirs))


def test_order_is_that_of_the_tokens_or_of_the_choices() -> None:
    r = RouterInput(jnp.log(PROBS_TE), jnp.ones(2, bool), recorded=KEPT)
    assert replay(r).token_N.tolist() == [0, 1, 0, 1]
    assert replay(r, order="token_major").token_N.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="unknown weight 'live': use recorded, softmax"):
        replay(r, weight="live")
