"""A router that does without one expert of each token: how much does the best one matter?"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.routing import Router, RouterInput, Routing
from moejax.routing.decisions import decisions

NOTHING, CHOSEN, OTHER = -1, -2, -3  # beside ranks of choice, 0 = the best
_LOW = -1e9  # of a logit that no score is left of; finite, for routers that compute with logits


class Without(NamedTuple):
    """The state of an ablated router in one layer.

    Attributes:
      which: int32. A rank: the token's expert of that rank is taken away; NOTHING: none; CHOSEN: a
        random one of those it has; OTHER: a random one of those it has not.
      own: the router's own state.
    """

    which: jax.Array
    own: Any


def ablated(router: Router) -> Router:
    """The router, asked again without one expert of each token, as its state says (`Without`).

    The expert's logit is masked for this token and the router chooses anew, so the token has as
    many experts as before (DeepSeekMoE, Dai et al. 2024, 2401.06066, section 4.5). Where the router
    insists, by a table or by a bias, the assignment is taken out, and the token has one less. A
    token that has no expert of the rank keeps what it has.
    """

    def route(r: RouterInput) -> Routing:
        without, num_experts = r.state, r.logits_TE.shape[-1]
        r = r._replace(state=without.own)
        gone_T = _gone(router.route(r), without.which)
        masked_TE = jnp.arange(num_experts)[None] == gone_T[:, None]
        routing = router.route(r._replace(logits_TE=jnp.where(masked_TE, _LOW, r.logits_TE)))
        insists_N = routing.expert_N == gone_T[routing.token_N]
        return routing._replace(
            expert_N=jnp.where(insists_N, num_experts, routing.expert_N),
            weight_N=jnp.where(insists_N, 0.0, routing.weight_N),
        )

    return router._replace(route=route)


def _gone(routing: Routing, which: jax.Array) -> jax.Array:
    """The expert that each token does without, int32 [T]; E = none."""
    num_experts = routing.scores_TE.shape[-1]
    nothing_dropped_N = jnp.ones_like(routing.token_N, bool)
    expert_TR = decisions(routing, nothing_dropped_N).expert_TR
    chosen_TE = (expert_TR[:, :, None] == jnp.arange(num_experts)[None, None]).any(1)
    # Without noise for the router there is no key: the same draw for every group of tokens.
    draw_TE = jax.random.uniform(jax.random.key(0), chosen_TE.shape)

    def drawn(from_TE: jax.Array) -> jax.Array:
        best_T = jnp.where(from_TE, draw_TE, -1.0).argmax(-1)
        return jnp.where(from_TE.any(-1), best_T, num_experts)

    ranked_T = jnp.take(expert_TR, jnp.clip(which, 0, num_experts - 1), axis=1)
    others_T = jnp.where(which == CHOSEN, drawn(chosen_TE), drawn(~chosen_TE))
    return jnp.where(which >= 0, ranked_T, jnp.where(which == NOTHING, num_experts, others_T))
