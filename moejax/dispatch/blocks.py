"""On a CPU: each expert walks over its own rows in blocks, a whole network per block, so that the
work follows the load.

`lax.ragged_dot` is a masked dense product there: E times the work.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moejax.dispatch.products import hidden_of

# An expert takes the blocks of each size that fit, largest first, and rounds up to the last.
# Each size is compiled, so a longer list costs compile time.
SMALL_BLOCKS = (128, 32)
LARGEST_BLOCK = 1024
BUFFER_BLOCK = 512


def forward(activation, rows, ins, w_out_EFD, load_E):
    """Outputs, and the hidden rows before the activation; see `grouped_ffn`."""
    rows_ND, start_E = _flat(rows), _starts(rows, load_E)

    def expert(e):
        ins_e, w_out_FD = [w[e] for w in ins], w_out_EFD[e]

        def step(block, carry):
            y_ND, pre = carry
            x_BD = block.read(rows_ND)
            new = [_dot("bd,df->bf", x_BD, w).astype(rows_ND.dtype) for w in ins_e]
            y_BD = _dot("bf,fd->bd", hidden_of(activation, *new), w_out_FD)
            return block.write(y_ND, y_BD), tuple(map(block.write, pre, new))

        return step

    num_rows = len(rows_ND)
    pre = tuple(jnp.zeros_like(rows_ND, shape=(num_rows, w.shape[2])) for w in ins)
    carry = (jnp.zeros_like(rows_ND), pre)
    sizes = _sizes(rows, len(load_E))
    y_ND, pre = _fold_blocks(expert, carry, start_E, load_E, num_rows, sizes)
    return y_ND.reshape(rows.shape), tuple(a.reshape(*rows.shape[:-1], -1) for a in pre)


def backward(activation, dy, rows, ins, w_out_EFD, load_E, pre):
    """Gradients by the rows, the input weights and the output weights."""
    rows_ND, dy_ND, start_E = _flat(rows), _flat(dy), _starts(rows, load_E)
    pre = tuple(map(_flat, pre))

    def expert(e):
        ins_e, w_out_FD = [w[e] for w in ins], w_out_EFD[e]

        def step(block, carry):
            dx_ND, dins, dw_out_EFD = carry
            x_BD, dy_BD = block.read(rows_ND), block.read(dy_ND)
            hidden_BF, hidden_vjp = jax.vjp(partial(hidden_of, activation), *map(block.read, pre))
            dhidden_BF = _dot("bd,fd->bf", dy_BD, w_out_FD).astype(hidden_BF.dtype)
            dpre = hidden_vjp(dhidden_BF)
            dx_BD = sum(map(partial(_dot, "bf,df->bd"), dpre, ins_e))
            dins_e = map(partial(_dot, "bd,bf->df", x_BD), dpre)
            dins = tuple(map(partial(_add_at, e), dins, dins_e))
            dw_out_EFD = _add_at(e, dw_out_EFD, _dot("bf,bd->fd", hidden_BF, dy_BD))
            return block.write(dx_ND, dx_BD), dins, dw_out_EFD

        return step

    zeros = jax.tree.map(partial(jnp.zeros_like, dtype=jnp.float32), (ins, w_out_EFD))
    carry = (jnp.zeros_like(rows_ND), *zeros)
    sizes = _sizes(rows, len(load_E))
    dx_ND, *grads = _fold_blocks(expert, carry, start_E, load_E, len(rows_ND), sizes)
    dins, dw_out_EFD = jax.tree.map(lambda d, w: d.astype(w.dtype), tuple(grads), (ins, w_out_EFD))
    return dx_ND.reshape(rows.shape), dins, dw_out_EFD


def _flat(a: Array) -> Array:
    return a.reshape(-1, a.shape[-1])


def _sizes(rows: Array, experts: int) -> list[int]:
    """Of the blocks. The largest is what an expert has of sorted rows when all have the same: it is
    one block then. A buffer is larger than that."""
    num_rows = rows.size // rows.shape[-1]
    fair = BUFFER_BLOCK if rows.ndim == 3 else -(-num_rows // experts // 64) * 64
    largest = min(fair, LARGEST_BLOCK)
    sizes = [largest, *SMALL_BLOCKS] if largest > SMALL_BLOCKS[0] else SMALL_BLOCKS
    return [min(size, num_rows) for size in sizes]


def _starts(rows: Array, load_E: Array) -> Array:
    """Where each expert's rows begin: behind the last one's, or with its buffer."""
    if rows.ndim == 3:
        return jnp.arange(rows.shape[0], dtype=load_E.dtype) * rows.shape[1]
    return jnp.cumsum(load_E) - load_E


class _Block(NamedTuple):
    """Rows start .. start + B of a sorted array; `keep` marks those that are the expert's."""

    start: Array
    keep_B1: Array

    def read(self, rows: Array) -> Array:
        rows = lax.dynamic_slice_in_dim(rows, self.start, len(self.keep_B1))
        return jnp.where(self.keep_B1, rows, 0)

    def write(self, rows: Array, new: Array) -> Array:
        old = lax.dynamic_slice_in_dim(rows, self.start, len(self.keep_B1))
        new = jnp.where(self.keep_B1, new.astype(rows.dtype), old)
        return lax.dynamic_update_slice_in_dim(rows, new, self.start, 0)


def _block(first: Array, end: Array, size: int, num_rows: int) -> _Block:
    start = jnp.minimum(first, num_rows - size)  # else the slice would be moved silently
    row_B = start + jnp.arange(size)
    return _Block(start, ((first <= row_B) & (row_B < end))[:, None])


def _fold_blocks(
    expert: Callable,
    carry: Any,
    start_E: Array,
    load_E: Array,
    num_rows: int,
    sizes: list[int],
) -> Any:
    """Equivalent to: for e in range(E): for block of e's rows: carry = expert(e)(block, carry)."""

    def visit(e, carry):
        step, first, end = expert(e), start_E[e], start_E[e] + load_E[e]
        for size in sizes:
            # Any block costs about 30 rows more than its own: nearly full beats several small ones.
            slack = size - 1 if size == sizes[-1] else size // 4
            count = jnp.maximum(end - first + slack, 0) // size

            def at(b, carry, first=first, size=size):
                return step(_block(first + b * size, end, size, num_rows), carry)

            carry = lax.fori_loop(0, count, at, carry)
            first = first + count * size
        return carry

    return lax.fori_loop(0, len(load_E), visit, carry)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _add_at(e: Array, sum_E: Array, new: Array) -> Array:
    new = lax.dynamic_index_in_dim(sum_E, e, keepdims=False) + new
    return lax.dynamic_update_index_in_dim(sum_E, new, e, 0)
