"""The exchange between expert shards: rows to the devices that hold their experts, and back."""

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
    arrays = (
        *(operand_NX, output_MX),
        *(input_offsets_R, send_sizes_R, output_offsets_R, recv_sizes_R),
    )

    def native(*arrays: jax.Array) -> jax.Array:
        return jax.lax.ragged_all_to_all(*arrays, axis_name=axis_name)

    def emulated(*arrays: jax.Array) -> jax.Array:
        return _gather_and_look_up(*arrays[:5], axis_name=axis_name)

    return jax.lax.platform_dependent(*arrays, cpu=emulated, default=native)


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
