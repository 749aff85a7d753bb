"""From what a router sees to this device's plan, whatever the mesh.

A router whose tokens choose alone, or whose groups lie whole on a device, is asked about this
device's tokens only; capacity across devices needs no more than their counts. Any other router
(expert choice over the batch, assignments, a user's function without a spec) sees the whole batch
on every device, and each device keeps what is about its tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.dispatch.plan import Plan, make_plan, num_groups, route
from moejax.dispatch.shards import ALONE, Shards
from moejax.routing import Router, RouterInput, Routing


def route_and_plan(
    router: Router,
    r: RouterInput,
    sequences: int,
    *,
    groups: str,
    capacity_factor: float | None,
    shards: Shards = ALONE,
) -> tuple[Routing, Plan]:
    """The routing and the plan of the tokens here, in their local numbers 0 ... T - 1.

    Args:
      router: the router.
      r: of the tokens here, sequence by sequence.
      sequences: how many sequences they are.
      groups, capacity_factor: see `moejax.config.MoeConfig`. They hold for the whole batch.
      shards: how the batch is cut, inside `shard_map`.

    Returns:
      The routing's own sums are this device's share: `shards.total` gives the batch's.
    """
    if not shards.axes or is_local(router, r, groups, capacity_factor):
        routing = route(router.route, r, sequences, groups)
        count = num_groups(sequences, r.valid_T.shape[0] // sequences, groups)
        waves = 1 if router.order == "token_major" else per_token(router, routing)
        sharing = shards if groups == "batch" else ALONE
        return routing, make_plan(routing, capacity_factor, count, sharing, waves)
    # The state is the same everywhere already.
    whole = shards.whole(r._replace(state=None))._replace(state=r.state)
    routing = route(router.route, whole, sequences * shards.count, groups)
    num_tokens = r.valid_T.shape[0]
    count = num_groups(sequences * shards.count, num_tokens // sequences, groups)
    plan = make_plan(routing, capacity_factor, count)
    most = min(routing.token_N.shape[0], num_tokens * per_token(router, routing))
    return mine(routing, plan, num_tokens, most, shards)


def is_local(router: Router, r: RouterInput, groups: str, capacity_factor: float | None) -> bool:
    """Whether each device can ask the router about its own tokens."""
    if groups == "sequence":
        return True
    # Batch priority compares tokens of all devices; otherwise their counts say who comes first.
    ordered = router.order != "bpr" or capacity_factor is None
    return groups == "batch" and tokens_choose(router) and ordered


def per_token(router: Router, routing: Routing) -> int:
    """How many assignments a token has at most: K where it chooses, else E."""
    num_tokens, num_experts = routing.scores_TE.shape
    return routing.token_N.shape[0] // num_tokens if tokens_choose(router) else num_experts


def tokens_choose(router: Router) -> bool:
    """Whether each token is known to choose for itself, with choices 0 .. K - 1."""
    return router.spec is not None and router.spec.chooses == "token"


def mine(
    routing: Routing, plan: Plan, num_tokens: int, most: int, shards: Shards
) -> tuple[Routing, Plan]:
    """What of the whole batch's routing and plan is about the `num_tokens` tokens here, `most`
    assignments at most."""
    first, num_experts = shards.index() * num_tokens, routing.scores_TE.shape[-1]
    token_N = routing.token_N - first
    mine_N = (token_N >= 0) & (token_N < num_tokens)
    order_n = jnp.argsort(~mine_N, stable=True)[:most]

    def here(a_T: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a_T, first, num_tokens)

    # The sums are of the batch: one device has them all, the others nothing.
    share = jnp.asarray(shards.index() == 0)
    local = Routing(
        jnp.clip(token_N, 0, num_tokens - 1)[order_n],
        jnp.where(mine_N, routing.expert_N, num_experts)[order_n],
        jnp.where(mine_N, routing.weight_N, 0.0)[order_n],
        routing.choice_N[order_n],
        here(routing.scores_TE),
        {name: jnp.where(share, sums, 0) for name, sums in routing.sums.items()},
        None if routing.rest_TD is None else here(routing.rest_TD),
    )
    kept_n = jnp.where(mine_N, plan.expert_N, num_experts)[order_n]
    kept = make_plan(local._replace(expert_N=kept_n, weight_N=plan.weight_N[order_n]), None)
    return local, dataclasses.replace(kept, choices=plan.choices)
