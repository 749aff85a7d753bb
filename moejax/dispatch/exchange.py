"""The exchange between expert shards: rows to the devices that hold their experts, and back."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def ragged_all_to_all(
    operand_NX: jax.Array,
    output_MX: jax.Array,
    input_offsets_R: jax.Array,
    send_sizes_R: jax.Array,
    output_offsets_R: jax.Array,
    recv_sizes_R: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all`, on every platform.

    Inside `shard_map`. This device sends rows input_offsets[j] : + send_sizes[j] of its operand to
    device j of the axis, which writes them at output_offsets[j] of its own output. Where nobody
    writes, the output keeps what it was given. CPUs lack the collective: there, one all-gather and
    a look-up stand in for it, with the same values and gradients, in the memory of all operands.

    Args:
      operand_NX: rows to send.
      output_MX: what the result is before anything arrives.
      input_offsets_R, send_sizes_R, output_offsets_R, recv_sizes_R: int32, one entry for each of
        the R devices of the axis; recv_sizes[j] = rows that come from device j.
      axis_name: the mesh axis.
    """
    sizes = input_offsets_R, send_sizes_R, output_offsets_R, recv_sizes_R
    return _exchange(axis_name, len(operand_NX), operand_NX, output_MX, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(axis_name: str, num_rows: int, operand_NX: Any, output_MX: Any, sizes: Any) -> Any:
    native, emulated = _implementations(axis_name)
    arrays = operand_NX, output_MX, *sizes
    return jax.lax.platform_dependent(*arrays, cpu=emulated, default=native)


def _forward(axis_name: str, num_rows: int, *arguments: Any) -> tuple[Any, Any]:
    return _exchange(axis_name, num_rows, *arguments), arguments[-1]


def _backward(axis_name: str, num_rows: int, sizes: Any, dy_MX: Any) -> tuple[Any, Any, None]:
    # The platform is chosen inside this rule: the gradient of a choice is a conditional in the
    # compiled program, within which no transfer runs beside anything.
    def transposed(exchange: Any) -> Any:
        def run(dy_MX: jax.Array, *sizes: jax.Array) -> Any:
            # The exchange is linear: its gradient needs shapes only, that vary as dy does.
            output_MX = dy_MX - dy_MX
            rows_NX = jnp.broadcast_to(output_MX[:1], (num_rows, *dy_MX.shape[1:]))
            _, vjp = jax.vjp(lambda *ends: exchange(*ends, *sizes), rows_NX, output_MX)
            return vjp(dy_MX)

        return run

    native, emulated = map(transposed, _implementations(axis_name))
    drows = jax.lax.platform_dependent(dy_MX, *sizes, cpu=emulated, default=native)
    return *drows, None


_exchange.defvjp(_forward, _backward)


def _implementations(axis_name: str) -> tuple[Any, Any]:
    """The collective itself, and what stands in for it on CPUs."""
    native = partial(jax.lax.ragged_all_to_all, axis_name=axis_name)
    return native, lambda *arrays: _gather_and_look_up(*arrays[:5], axis_name=axis_name)


def _gather_and_look_up(
    operand_NX: jax.Array,
    output_MX: jax.Array,
    input_offsets_R: jax.Array,
    send_sizes_R: jax.Array,
    output_offsets_R: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    me = jax.lax.axis_index(axis_name)

    def to_me(a_R: jax.Array) -> jax.Array:
        return jax.lax.all_gather(a_R, axis_name)[:, me, None]

    begin_R1, size_R1 = to_me(output_offsets_R), to_me(send_sizes_R)
    row_RM = jnp.arange(output_MX.shape[0])[None] - begin_R1  # the row of what that device sends me
    sent_RM = (row_RM >= 0) & (row_RM < size_R1)
    sender_1M = sent_RM.argmax(0)[None]
    source_RM = to_me(input_offsets_R) + row_RM
    source_M = jnp.take_along_axis(source_RM, sender_1M, axis=0)[0]
    operand_RNX = jax.lax.all_gather(operand_NX, axis_name)
    # Clipped where nobody sends: the row is not used there.
    found_MX = operand_RNX.at[sender_1M[0], source_M].get(mode="clip")
    written_M = sent_RM.any(0).reshape(-1, *(1,) * (output_MX.ndim - 1))
    return jnp.where(written_M, found_MX, output_MX)
