"""Expert parallelism: every expert shard holds E / R experts; tokens travel to them and back.

Inside `shard_map`. Tokens lie cut over the axes BATCH_AXES, experts over `expert`, their hidden
width over `tensor`. Routing and plan are made for the whole batch before, so that who is kept, who
drops and all statistics are those of one device; what happens here is only the exchange: one
all-to-all there, one back, over the `expert` axis.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.dispatch.exchange import ragged_all_to_all
from moejax.dispatch.experts import Experts, experts_batched, experts_grouped
from moejax.dispatch.plan import Plan

BATCH_AXES = ("data", "fsdp", "expert")


class Rows(NamedTuple):
    """This device's assignments, sorted by expert, n of them at most; those behind are empty.

    Attributes:
      token_n: int32, the local row.
      expert_n: int32, the global expert; E = empty.
      weight_n: float32, 0 where empty.
      rank_n: int32, how many of this device's rows before it go to the same expert.
      load_E: int32, rows for each expert.
    """

    token_n: jax.Array
    expert_n: jax.Array
    weight_n: jax.Array
    rank_n: jax.Array
    load_E: jax.Array


def expert_parallel(
    p: Experts, x_TD: jax.Array, plan: Plan, activation: str, *, dispatch: str, bounds: "Bounds"
) -> tuple[jax.Array, jax.Array]:
    """What `gather` and `dropless` compute, with the experts spread over the mesh that is set.

    Args:
      p, x_TD, plan, activation: as there, of the whole batch.
      dispatch: 'gather' or 'dropless': how a device computes what it received.
      bounds: see `Bounds`.

    Raises:
      ValueError: experts that do not divide by the `expert` axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = mesh.shape["expert"]
    if p.w_in_EDF.shape[0] % shards:
        raise ValueError(
            f"{p.w_in_EDF.shape[0]} experts are not divisible by mesh axis expert={shards}"
        )
    tokens, inwards = P(BATCH_AXES, None), P("expert", None, "tensor")
    lie: dict[str, Any] = {"w_in_EDF": inwards, "w_out_EFD": P("expert", "tensor", None)}
    if p.w_gate_EDF is not None:
        lie["w_gate_EDF"] = inwards
    local = functools.partial(_LOCAL[dispatch], activation=activation, bounds=bounds)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(Experts(**lie), tokens, P()),
        out_specs=(tokens, P()),
        check_vma=False,
    )(p, x_TD, plan)


class Bounds(NamedTuple):
    """Static sizes that make every exchange safe, whatever the routing.

    Attributes:
      per_token: no token has more assignments.
      local_slots: whether a group of tokens never spans two devices, so that a device's tokens have
        their own share of each expert's slots.
    """

    per_token: int
    local_slots: bool


def _dropless(
    p: Experts, x_TD: jax.Array, plan: Plan, *, activation: str, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    rows = _rows(plan, x_TD.shape[0], p.w_in_EDF.shape[0], bounds.per_token)
    shards = jax.lax.axis_size("expert")
    sent_RE = rows.load_E.reshape(shards, -1)
    came_RE = _swap(sent_RE)  # from each device, for each of my experts
    send_R, receive_R = sent_RE.sum(1), came_RE.sum(1)
    send_at_R, receive_at_R = _starts(send_R), _starts(receive_R)
    x_nD = x_TD[rows.token_n]
    space_MD = jnp.zeros((shards * x_nD.shape[0], x_nD.shape[1]), x_nD.dtype)
    x_MD = ragged_all_to_all(
        *(x_nD, space_MD, send_at_R, send_R, _swap(receive_at_R), receive_R), axis_name="expert"
    )
    order_M = jnp.argsort(_experts_of(came_RE, x_MD.shape[0]), stable=True)
    y_MD = experts_grouped(p, x_MD[order_M], came_RE.sum(0), activation)
    y_MD = jnp.zeros_like(y_MD).at[order_M].set(y_MD, unique_indices=True)
    y_MD = jax.lax.psum(y_MD, "tensor")
    y_nD = ragged_all_to_all(
        *(y_MD, jnp.zeros_like(x_nD), receive_at_R, receive_R, _swap(send_at_R), send_R),
        axis_name="expert",
    )
    return _combine(x_TD, rows, y_nD)


def _gather(
    p: Experts, x_TD: jax.Array, plan: Plan, *, activation: str, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    rows = _rows(plan, x_TD.shape[0], p.w_in_EDF.shape[0], bounds.per_token)
    shards, num_local = jax.lax.axis_size("expert"), p.w_in_EDF.shape[0]
    slots = min(plan.slots, x_TD.shape[0])
    if bounds.local_slots:
        slots = plan.slots // jax.lax.axis_size(BATCH_AXES)
    where = (rows.expert_n, rows.rank_n)
    x_ECD = jnp.zeros((shards * num_local, slots, x_TD.shape[1]), x_TD.dtype)
    x_ECD = x_ECD.at[where].set(x_TD[rows.token_n], mode="drop")
    x_RECD = _swap(x_ECD.reshape(shards, num_local, slots, -1))
    x_EMD = jnp.moveaxis(x_RECD, 0, 1).reshape(num_local, shards * slots, -1)
    y_EMD = jax.lax.psum(experts_batched(p, x_EMD, activation), "tensor")
    y_RECD = _swap(jnp.moveaxis(y_EMD.reshape(num_local, shards, slots, -1), 1, 0))
    y_nD = y_RECD.reshape(x_ECD.shape).at[where].get(mode="fill", fill_value=0)
    return _combine(x_TD, rows, y_nD)


_LOCAL: dict[str, Any] = {"gather": _gather, "dropless": _dropless}


def _rows(plan: Plan, num_tokens: int, num_local_experts: int, per_token: int) -> Rows:
    """What of the whole batch's plan is about this device's tokens."""
    num_experts = num_local_experts * jax.lax.axis_size("expert")
    token_N = plan.token_N - jax.lax.axis_index(BATCH_AXES) * num_tokens
    mine_N = (token_N >= 0) & (token_N < num_tokens)
    expert_N = jnp.where(mine_N, plan.expert_N, num_experts)
    most = min(expert_N.shape[0], num_tokens * per_token)
    order_n = jnp.argsort(expert_N, stable=True)[:most]
    expert_n = expert_N[order_n]
    load_E = jnp.zeros(num_experts, jnp.int32).at[expert_N].add(1, mode="drop")
    start_E = jnp.append(_starts(load_E), 0)
    return Rows(
        token_n=jnp.clip(token_N[order_n], 0, num_tokens - 1),
        expert_n=expert_n,
        weight_n=jnp.where(expert_n < num_experts, plan.weight_N[order_n], 0.0),
        rank_n=jnp.arange(most, dtype=jnp.int32) - start_E[expert_n],
        load_E=load_E,
    )


def _combine(x_TD: jax.Array, rows: Rows, y_nD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weighted sum back at each token, and each expert's weighted outputs added up."""
    y_nD = y_nD.astype(jnp.float32) * rows.weight_n[:, None]
    y_TD = jnp.zeros(x_TD.shape, jnp.float32).at[rows.token_n].add(y_nD)
    output_ED = jnp.zeros((rows.load_E.shape[0], x_TD.shape[1]), jnp.float32)
    output_ED = output_ED.at[rows.expert_n].add(y_nD, mode="drop")
    return y_TD.astype(x_TD.dtype), jax.lax.psum(output_ED, BATCH_AXES)


def _swap(a_RX: jax.Array) -> jax.Array:
    """Row j goes to device j of the expert axis; row i of the result came from device i."""
    return jax.lax.all_to_all(a_RX, "expert", 0, 0)


def _starts(size_R: jax.Array) -> jax.Array:
    return jnp.cumsum(size_R) - size_R


def _experts_of(came_RE: jax.Array, space: int) -> jax.Array:
    """The local expert of each received row [M]; rows behind the last have the highest number."""
    shards, num_local = came_RE.shape
    ends = jnp.cumsum(came_RE.reshape(-1))
    place_M = jnp.searchsorted(ends, jnp.arange(space), side="right")
    return jnp.where(place_M < shards * num_local, place_M % num_local, num_local)
