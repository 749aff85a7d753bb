"""From a routing to a plan: who fits. The one place where capacity is applied.

Groups: capacity, and an expert's choice among tokens, hold within a *group* of tokens. 'batch':
all tokens of the batch; 'sequence': each sequence on its own; 'position': the tokens at one
position of all sequences. Group g owns the slots [g C, (g+1) C) of every expert's buffer, so that
dispatch knows nothing of groups.

Inside `shard_map` a plan is about this device's tokens, and so are its slots: a device's rows of an
expert fill a buffer of its own. Who drops is decided in the whole batch.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.dispatch.shards import ALONE, Shards
from moejax.routing.types import RouterFn, RouterInput, Routing, token_keys

GROUPS = ("batch", "sequence", "position")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Assignments after capacity, in the order of the routing.

    Attributes:
      token_N: int32.
      expert_N: int32; num_experts = nowhere (dropped, or never assigned).
      weight_N: float32, 0 where nowhere. The weights of a token's other choices are not
        renormalised.
      slot_N: int32, the place in the expert's buffer of groups x C slots; distinct per expert.
      load_E: int32, kept assignments per expert.
      order_N: int32, the permutation that sorts the assignments by expert; those nowhere come last.
      slots: static int, groups x C, the size of an expert's buffer.
      choices: static int, assignments over tokens: K where tokens choose.
      room: static, the rows that a device of the axis `expert` has room for when they travel
        sorted; None = for those of all devices.
    """

    token_N: jax.Array
    expert_N: jax.Array
    weight_N: jax.Array
    slot_N: jax.Array
    load_E: jax.Array
    order_N: jax.Array
    slots: int = dataclasses.field(metadata={"static": True})
    choices: int = dataclasses.field(metadata={"static": True})
    room: int | None = dataclasses.field(default=None, metadata={"static": True})


def num_groups(sequences: int, length: int, groups: str) -> int:
    """How many groups a batch of so many sequences of one length is cut into."""
    return {"batch": 1, "sequence": sequences, "position": length}[groups]


def split_groups(a_T: jax.Array, sequences: int, groups: str) -> jax.Array:
    """[T, ...] with T = B S, sequence by sequence, to [G, tokens of a group, ...]."""
    if groups == "batch":
        return a_T[None]
    a_BS = a_T.reshape(sequences, -1, *a_T.shape[1:])
    return a_BS if groups == "sequence" else jnp.swapaxes(a_BS, 0, 1)


def merge_groups(a_G: jax.Array, groups: str) -> jax.Array:
    """The inverse of `split_groups`."""
    a_BS = jnp.swapaxes(a_G, 0, 1) if groups == "position" else a_G
    return a_BS.reshape(-1, *a_BS.shape[2:])


def route(router: RouterFn, r: RouterInput, sequences: int, groups: str) -> Routing:
    """The router applied to each group; its assignments, listed group by group, in the numbers of
    the tokens of `r`."""
    if r.key is not None:
        r = r._replace(key=token_keys(r.key, r.logits_TE.shape[0]))
    token_T = jnp.arange(r.logits_TE.shape[0], dtype=jnp.int32)
    token_G = split_groups(token_T, sequences, groups)
    # Every field has the token axis but the state, which all groups share.
    of_tokens = r._replace(state=None)
    in_groups = jax.tree.map(lambda a: split_groups(a, sequences, groups), of_tokens)._replace(
        state=r.state
    )
    axes = jax.tree.map(lambda _: 0, in_groups._replace(state=None))
    routing = jax.vmap(router, in_axes=(axes,))(in_groups)
    token_GN = jnp.take_along_axis(token_G, routing.token_N, axis=1)
    rest_GTD = routing.rest_TD
    return Routing(
        token_GN.reshape(-1),
        routing.expert_N.reshape(-1),
        routing.weight_N.reshape(-1),
        routing.choice_N.reshape(-1),
        merge_groups(routing.scores_TE, groups),
        {name: sums_G.sum(0) for name, sums_G in routing.sums.items()},
        None if rest_GTD is None else merge_groups(rest_GTD, groups),
    )


def capacity(factor: float | None, assignments: int, num_experts: int, tokens: int) -> int:
    """Slots of one expert for one group: C = ceil(factor x assignments / experts).

    A factor of 1 is exactly enough at perfect balance, whatever K is. (Mesh TensorFlow and its
    heirs quote factors without K: their top-2 at 2.0 is 1.0 here.) None = as many as there are
    tokens: nothing is ever dropped.

    Raises:
      ValueError: factor not above 0.
    """
    most = min(tokens, assignments)
    if factor is None:
        return most
    if factor <= 0:
        raise ValueError(f"capacity factor {factor} leaves no slot; use a factor > 0, or None")
    # Rounded first: 1.1 * 10 / 1 is 11.000000000000002 and would buy a slot that nobody asked for.
    return min(math.ceil(round(factor * assignments / num_experts, 9)), most)


def make_plan(
    routing: Routing,
    capacity_factor: float | None,
    groups: int = 1,
    shards: Shards = ALONE,
    waves: int = 1,
) -> Plan:
    """Walk each group's assignments in order; each takes the next slot of its expert while one is
    free.

    Args:
      routing: N assignments, N / groups for each group, listed group by group.
      capacity_factor: see `capacity`.
      groups: how many groups the N assignments are cut into.
      shards: inside `shard_map`, the devices that share one group; groups is 1 then.
      waves: with `shards`, the equal runs of the list that come after each other in
        the whole batch: K where all first choices go before any second one.
    """
    num_tokens, num_experts = routing.scores_TE.shape
    num = routing.token_N.shape[0]
    in_group, tokens = num // groups * shards.count, num_tokens // groups * shards.count
    room = capacity(capacity_factor, in_group, num_experts, tokens)
    slots = min(room, num // groups, num_tokens // groups)
    # Sorted by (expert, group) and, the sort being stable, by priority.
    group_N = jnp.arange(num, dtype=jnp.int32) // (num // groups)
    bucket_N = jnp.where(
        routing.expert_N < num_experts, routing.expert_N * groups + group_N, num_experts * groups
    )
    order_N, rank_N, _ = _ranked(bucket_N, num_experts * groups)
    plan = Plan(
        token_N=routing.token_N,
        expert_N=jnp.minimum(routing.expert_N, num_experts),
        weight_N=routing.weight_N,
        slot_N=group_N * slots + rank_N,
        load_E=jnp.zeros(num_experts, jnp.int32),
        order_N=order_N,
        slots=groups * slots,
        choices=max(1, num // num_tokens),
    )
    if room >= min(in_group, tokens):  # nothing drops
        return _keeping(plan, routing.expert_N < num_experts, order_N)
    before_N = 0 if shards.count == 1 else _earlier_elsewhere(routing, waves, shards)
    return _keeping(plan, (routing.expert_N < num_experts) & (rank_N + before_N < room))


def fitted(plan: Plan, factor: float | None) -> Plan:
    """Inside `shard_map`: a plan without the rows that have no room where their experts are.

    The fair share of a device of the axis `expert` is as many rows as each sends; it has room for
    `factor` times that, None = for all. Rows of earlier devices come first, then those of earlier
    tokens: no token loses its place to a later one of its sequence.
    """
    num, num_experts = plan.token_N.shape[0], plan.load_E.shape[0]
    shards = jax.lax.axis_size("expert")
    if factor is None or factor >= shards:
        return plan
    room = math.ceil(round(factor * num, 9))
    there_N = plan.expert_N // (num_experts // shards)  # nowhere is behind the last device
    _, rank_N, send_R = _ranked(there_N, shards, plan.token_N)
    sent_RR = jax.lax.all_gather(send_R, "expert")
    earlier_R = jnp.arange(shards) < jax.lax.axis_index("expert")
    before_R = jnp.where(earlier_R[:, None], sent_RR, 0).sum(0)
    before_N = before_R.at[there_N].get(mode="fill", fill_value=0)
    kept = _keeping(plan, (plan.expert_N < num_experts) & (rank_N + before_N < room))
    return dataclasses.replace(kept, room=room)


def _ranked(
    bucket_N: jax.Array, buckets: int, *within_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The stable order by bucket, and within one by other keys, if any; each one's number among
    those of its bucket, and the buckets' sizes. Bucket number `buckets` is nowhere."""
    num = bucket_N.shape[0]
    order_N = jnp.lexsort((*within_N, bucket_N)).astype(jnp.int32)
    sizes = jnp.zeros(buckets + 1, jnp.int32).at[bucket_N].add(1)
    start = jnp.cumsum(sizes) - sizes
    place_N = jnp.arange(num, dtype=jnp.int32) - start[bucket_N[order_N]]
    rank_N = jnp.zeros(num, jnp.int32).at[order_N].set(place_N, unique_indices=True)
    return order_N, rank_N, sizes[:-1]


def _keeping(plan: Plan, keep_N: jax.Array, order_N: jax.Array | None = None) -> Plan:
    """The plan of some of its assignments; the others move behind them all, unless `order_N` has
    them there."""
    num_experts = plan.load_E.shape[0]
    expert_N = jnp.where(keep_N, plan.expert_N, num_experts)
    if order_N is None:
        order_N = plan.order_N[jnp.argsort(~keep_N[plan.order_N], stable=True)]
    return dataclasses.replace(
        plan,
        expert_N=expert_N,
        weight_N=jnp.where(keep_N, plan.weight_N, 0.0),
        load_E=jnp.zeros(num_experts, jnp.int32).at[expert_N].add(1, mode="drop"),
        order_N=order_N,
    )


def _earlier_elsewhere(routing: Routing, waves: int, shards: Shards) -> jax.Array:
    """For each assignment, how many of other devices go to its expert before it: those of earlier
    waves, and those of its own wave on devices with earlier tokens."""
    num_experts = routing.scores_TE.shape[-1]
    expert_WN = routing.expert_N.reshape(waves, -1)
    wave_WN = jnp.broadcast_to(jnp.arange(waves)[:, None], expert_WN.shape)
    count_WE = jnp.zeros((waves, num_experts), jnp.int32).at[wave_WN, expert_WN].add(1, mode="drop")
    count_RWE = shards.stacked(count_WE)
    others_WE = count_RWE.sum(0) - count_WE
    earlier_waves_WE = jnp.cumsum(others_WE, axis=0) - others_WE
    earlier_R = jnp.arange(shards.count) < shards.index()
    earlier_shards_WE = jnp.where(earlier_R[:, None, None], count_RWE, 0).sum(0)
    before_WE = earlier_waves_WE + earlier_shards_WE
    return before_WE.at[wave_WN, expert_WN].get(mode="fill", fill_value=0).reshape(-1)
