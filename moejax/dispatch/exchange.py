"""The exchange between expert shards: rows to the devices that hold their experts, and back."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def ragged_all_to_all(
    operand_NX: jax.Array,
    output_MX: jax.Array,
    input_offsets_K: jax.Array,
    send_sizes_K: jax.Array,
    output_offsets_K: jax.Array,
    recv_sizes_K: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all`, on every platform.

    Inside `shard_map`. This device sends K slices, the first K / R of them to the first of the R
    devices of the axis, and so on: rows input_offsets[k] : + send_sizes[k] of its operand, which
    are written at output_offsets[k] of that device's output. Where nobody writes, the output keeps
    what it was given. CPUs lack the collective: there, one all-gather and a look-up stand in for
    it, with the same values and gradients, in the memory of all operands.

    Args:
      operand_NX: rows to send.
      output_MX: what the result is before anything arrives.
      input_offsets_K, send_sizes_K, output_offsets_K, recv_sizes_K: int32; recv_sizes are those of
        the slices that come, the first K / R of them from the first device.
      axis_name: the mesh axis.
    """
    sizes = input_offsets_K, send_sizes_K, output_offsets_K, recv_sizes_K
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
    input_offsets_K: jax.Array,
    send_sizes_K: jax.Array,
    output_offsets_K: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    me, shards = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)

    def to_me(a_K: jax.Array) -> jax.Array:
        a_RRk = jax.lax.all_gather(a_K.reshape(shards, -1), axis_name)
        return a_RRk[:, me].reshape(-1, 1)

    begin_K1, size_K1 = to_me(output_offsets_K), to_me(send_sizes_K)
    row_KM = jnp.arange(output_MX.shape[0])[None] - begin_K1  # the row of that slice
    sent_KM = (row_KM >= 0) & (row_KM < size_K1)
    slice_1M = sent_KM.argmax(0)[None]
    source_KM = to_me(input_offsets_K) + row_KM
    source_M = jnp.take_along_axis(source_KM, slice_1M, axis=0)[0]
    sender_M = slice_1M[0] // (len(send_sizes_K) // shards)
    operand_RNX = jax.lax.all_gather(operand_NX, axis_name)
    # Clipped where nobody sends: the row is not used there.
    found_MX = operand_RNX.at[sender_M, source_M].get(mode="clip")
    written_M = sent_KM.any(0).reshape(-1, *(1,) * (output_MX.ndim - 1))
    return jnp.where(written_M, found_MX, output_MX)
