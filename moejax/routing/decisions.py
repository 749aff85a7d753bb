"""A routing as lists of each token's experts: what a trace keeps, and what a replay is given."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.routing.types import Recorded, Routing


class Decisions(NamedTuple):
    """What a layer decided for each token, R experts a token at most.

    Only of use where the token is real: other tokens have no experts, and any entropy and margin.

    Attributes:
      expert_TR: int32, best first; num_experts = none.
      weight_TR: float32, 0 where none.
      dropped_TR: bool, assigned but found the expert full.
      entropy_T: float32, of the scores divided by their sum, in nats.
      margin_T: float32, the least score of a chosen expert minus the greatest of one not chosen;
        NaN where none is chosen, or all are.
      scores_TE: float32, `Routing.scores_TE`; None = not kept.
    """

    expert_TR: jax.Array
    weight_TR: jax.Array
    dropped_TR: jax.Array
    entropy_T: jax.Array
    margin_T: jax.Array
    scores_TE: jax.Array | None

    @property
    def recorded(self) -> Recorded:
        """What the router `replay` is given of it."""
        return Recorded(self.expert_TR, self.weight_TR)


def decisions(routing: Routing, kept_N: jax.Array, width: int = 0) -> Decisions:
    """A routing by token. What goes nowhere and what was computed for the gradient alone is left
    out.

    Args:
      routing: of any router.
      kept_N: bool, which of its assignments found room.
      width: R, where every token makes choices 0 .. R - 1: they stand in that order. 0 = tokens do
        not choose: R = E, and a token's experts stand by falling weight.
    """
    num_tokens, num_experts = routing.scores_TE.shape
    real_N = (routing.expert_N < num_experts) & (routing.choice_N >= 0)
    token_N = jnp.where(real_N, routing.token_N, num_tokens)
    weight_N = jax.lax.stop_gradient(routing.weight_N)
    rank_N = routing.choice_N if width else _rank_by_weight(token_N, weight_N, num_tokens)

    def by_token(a_N: jax.Array, nothing: float) -> jax.Array:
        empty_TR = jnp.full((num_tokens, width or num_experts), nothing, a_N.dtype)
        return empty_TR.at[token_N, rank_N].set(a_N, mode="drop")

    scores_TE = jax.lax.stop_gradient(routing.scores_TE)
    nobody_TE = jnp.zeros(scores_TE.shape, bool)
    chosen_TE = nobody_TE.at[token_N, routing.expert_N].set(True, mode="drop")
    return Decisions(
        expert_TR=by_token(routing.expert_N, num_experts),
        weight_TR=by_token(weight_N, 0.0),
        dropped_TR=by_token(~kept_N, False),
        entropy_T=_entropy(scores_TE),
        margin_T=_margin(scores_TE, chosen_TE),
        scores_TE=scores_TE,
    )


def _rank_by_weight(token_N: jax.Array, weight_N: jax.Array, num_tokens: int) -> jax.Array:
    """How many assignments of the same token weigh more; of equal ones, those listed before."""
    order_N = jnp.lexsort((-weight_N, token_N))
    size_T = jnp.zeros(num_tokens + 1, jnp.int32).at[token_N].add(1)
    start_N = (jnp.cumsum(size_T) - size_T)[token_N]
    place_N = jnp.zeros_like(order_N).at[order_N].set(jnp.arange(order_N.shape[0]))
    return place_N - start_N


def _entropy(scores_TE: jax.Array) -> jax.Array:
    """Entropy in nats of scores divided by their sum; 0 where that is 0."""
    total_T = scores_TE.sum(-1, keepdims=True)
    prob_TE = scores_TE / jnp.where(total_T > 0, total_T, 1.0)
    return -(prob_TE * jnp.log(jnp.where(prob_TE > 0, prob_TE, 1.0))).sum(-1)


def _margin(scores_TE: jax.Array, chosen_TE: jax.Array) -> jax.Array:
    least_T = jnp.where(chosen_TE, scores_TE, jnp.inf).min(-1)
    greatest_T = jnp.where(chosen_TE, -jnp.inf, scores_TE).max(-1)
    margin_T = least_T - greatest_T
    return jnp.where(jnp.isfinite(margin_T), margin_T, jnp.nan)
