"""A router that does without some experts of each token: how much do the best ones matter?"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.routing import Router, RouterInput, Routing
from moejax.routing.decisions import decisions

NOTHING, CHOSEN, OTHER = -1, -2, -3  # beside ranks of choice, 0 = the best
_LOW = -1e9  # of a logit that no score is left of; finite, for routers that compute with logits


def best(count: int) -> int:
    """For `Without.which`: the `count` best experts of each token."""
    return OTHER - count


class Without(NamedTuple):
    """The state of an ablated router in one layer.

    Attributes:
      which: int32. A rank: the token's expert of that rank is taken away; NOTHING: none; CHOSEN: a
        random one of those it has; OTHER: a random one of those it has not; best(n): its n best,
        those it has in the order of their ranks, and then the others by falling score.
      own: the router's own state.
    """

    which: jax.Array
    own: Any


def ablated(router: Router) -> Router:
    """The router, asked again without some experts of each token, as its state says (`Without`).

    Their logits are masked for this token and the router chooses anew, so the token has as many
    experts as before (DeepSeekMoE, Dai et al. 2024, 2401.06066, section 4.5). Where the router
    insists, by a table or by a bias, the assignment is taken out, and the token has one less. A
    token that has no expert of the rank keeps what it has.
    """

    def route(r: RouterInput) -> Routing:
        without, num_experts = r.state, r.logits_TE.shape[-1]
        r = r._replace(state=without.own)
        gone_TE = _gone(router.route(r), without.which)
        routing = router.route(r._replace(logits_TE=jnp.where(gone_TE, _LOW, r.logits_TE)))
        insists_N = gone_TE.at[routing.token_N, routing.expert_N].get(mode="fill", fill_value=False)
        return routing._replace(
            expert_N=jnp.where(insists_N, num_experts, routing.expert_N),
            weight_N=jnp.where(insists_N, 0.0, routing.weight_N),
        )

    return router._replace(route=route)


def _gone(routing: Routing, which: jax.Array) -> jax.Array:
    """The experts that each token does without, bool [T, E]."""
    num_tokens, num_experts = routing.scores_TE.shape
    nothing_dropped_N = jnp.ones_like(routing.token_N, bool)
    expert_TR = decisions(routing, nothing_dropped_N).expert_TR  # R = E
    token_T1, expert_1E = jnp.arange(num_tokens)[:, None], jnp.arange(num_experts)[None]
    nobody_TE = jnp.full((num_tokens, num_experts), num_experts)
    rank_TE = nobody_TE.at[token_T1, expert_TR].set(expert_1E, mode="drop")
    chosen_TE = rank_TE < num_experts
    place_TE = jnp.lexsort((-routing.scores_TE, rank_TE)).argsort(-1)
    # Without noise for the router there is no key: the same draw for every group of tokens.
    draw_TE = jax.random.uniform(jax.random.key(0), rank_TE.shape)

    def drawn(from_TE: jax.Array) -> jax.Array:
        best_T1 = jnp.where(from_TE, draw_TE, -1.0).argmax(-1, keepdims=True)
        return from_TE & (expert_1E == best_T1)

    # Each is empty but for its own values of `which`: no rank and no place is negative.
    return (
        (chosen_TE & (rank_TE == which))
        | ((which == CHOSEN) & drawn(chosen_TE))
        | ((which == OTHER) & drawn(~chosen_TE))
        | (place_TE < best(0) - which)
    )
