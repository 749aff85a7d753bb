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
from moejax.dispatch.rows import Rows

# An expert takes the blocks of each size that fit, largest first, and rounds up to the last.
# Each size is compiled, so a longer list costs compile time.
SMALL_BLOCKS = (128, 32)
LARGEST_BLOCK = 1024
BUFFER_BLOCK = 512


def forward(activation, rows: Rows, ins, w_out_EFD, load_E):
    """Outputs, and the hidden rows before the activation; see `grouped_ffn` and `tokens_ffn`."""
    x, start_E = _flat(rows.x), _starts(rows.x, load_E)

    def expert(e):
        ins_e, w_out_FD = [w[e] for w in ins], w_out_EFD[e]

        def step(block, carry):
            y, output_ED, pre = carry
            x_BD = block.read_at(rows, x)
            new = [_dot("bd,df->bf", x_BD, w).astype(x.dtype) for w in ins_e]
            hidden_BF = hidden_of(activation, block.weight_B1(rows), *new)
            y_BD = _dot("bf,fd->bd", hidden_BF, w_out_FD)
            if output_ED is not None:
                output_ED = _add_at(e, output_ED, y_BD.sum(0))
            return block.put(rows, y, y_BD), output_ED, tuple(map(block.write, pre, new))

        return step

    num_rows, y, output_ED = rows.number, rows.nothing(), None
    if rows.token_N is not None:
        output_ED = jnp.zeros_like(x, jnp.float32, (len(load_E), x.shape[1]))
    pre = tuple(jnp.zeros_like(x, shape=(num_rows, w.shape[2])) for w in ins)
    carry = (_flat(y), output_ED, pre)
    sizes = _sizes(rows, len(load_E))
    y, output_ED, pre = _fold_blocks(expert, carry, start_E, load_E, num_rows, sizes)
    if rows.token_N is not None:
        return (y, output_ED), pre
    return y.reshape(rows.x.shape), tuple(a.reshape(*rows.x.shape[:-1], -1) for a in pre)


def backward(activation, dy, rows: Rows, ins, w_out_EFD, load_E, pre):
    """Gradients by the rows, the input weights and the output weights."""
    x, dy, start_E = _flat(rows.x), _flat(dy), _starts(rows.x, load_E)
    pre = tuple(map(_flat, pre))

    def expert(e):
        ins_e, w_out_FD = [w[e] for w in ins], w_out_EFD[e]

        def step(block, carry):
            dx, dweight_N1, dins, dw_out_EFD = carry
            x_BD, dy_BD = block.read_at(rows, x), block.read_at(rows, dy).astype(x.dtype)
            hidden_BF, hidden_vjp = jax.vjp(
                partial(hidden_of, activation), block.weight_B1(rows), *map(block.read, pre)
            )
            dhidden_BF = _dot("bd,fd->bf", dy_BD, w_out_FD).astype(hidden_BF.dtype)
            dweight_B1, *dpre = hidden_vjp(dhidden_BF)
            dx_BD = sum(map(partial(_dot, "bf,df->bd"), dpre, ins_e))
            dins_e = map(partial(_dot, "bd,bf->df", x_BD), dpre)
            dins = tuple(map(partial(_add_at, e), dins, dins_e))
            dw_out_EFD = _add_at(e, dw_out_EFD, _dot("bf,bd->fd", hidden_BF, dy_BD))
            if dweight_N1 is not None:
                dweight_N1 = block.write(dweight_N1, dweight_B1)
            return block.put(rows, dx, dx_BD), dweight_N1, dins, dw_out_EFD

        return step

    zeros = jax.tree.map(partial(jnp.zeros_like, dtype=jnp.float32), (ins, w_out_EFD))
    dweight_N1 = None if rows.weight_N is None else jnp.zeros_like(rows.weight_N)[:, None]
    carry = (_flat(rows.nothing()), dweight_N1, *zeros)
    sizes = _sizes(rows, len(load_E))
    dx, dweight_N1, *grads = _fold_blocks(expert, carry, start_E, load_E, rows.number, sizes)
    dins, dw_out_EFD = jax.tree.map(lambda d, w: d.astype(w.dtype), tuple(grads), (ins, w_out_EFD))
    drows = Rows(
        dx.reshape(rows.x.shape), weight_N=None if dweight_N1 is None else dweight_N1[:, 0]
    )
    return drows, dins, dw_out_EFD


def _flat(a: Array) -> Array:
    return a.reshape(-1, a.shape[-1])


def _sizes(rows: Rows, experts: int) -> list[int]:
    """Of the blocks. The largest is what an expert has of sorted rows when all have the same: it is
    one block then. A buffer is larger than that."""
    fair = BUFFER_BLOCK if rows.x.ndim == 3 else -(-rows.number // experts // 64) * 64
    largest = min(fair, LARGEST_BLOCK)
    sizes = [largest, *SMALL_BLOCKS] if largest > SMALL_BLOCKS[0] else SMALL_BLOCKS
    return [min(size, rows.number) for size in sizes]


def _starts(rows: Array, load_E: Array) -> Array:
    """Where each expert's rows begin: behind the last one's, or with its buffer."""
    if rows.ndim == 3:
        return jnp.arange(rows.shape[0], dtype=load_E.dtype) * rows.shape[1]
    return jnp.cumsum(load_E) - load_E


class _Block(NamedTuple):
    """Rows start .. start + B of all; `keep` marks those that are the expert's."""

    start: Array
    keep_B1: Array

    def read(self, rows: Array) -> Array:
        """Of an array [N, ...], a row each."""
        return jnp.where(self.keep_B1, self._slice(rows), 0)

    def write(self, rows: Array, new: Array) -> Array:
        new = jnp.where(self.keep_B1, new.astype(rows.dtype), self._slice(rows))
        return lax.dynamic_update_slice_in_dim(rows, new, self.start, 0)

    def read_at(self, rows: Rows, a: Array) -> Array:
        """Of an array that lies as the rows do."""
        if rows.token_N is None:
            return self.read(a)
        return jnp.where(self.keep_B1, a[self._slice(rows.token_N)], 0)

    def put(self, rows: Rows, a: Array, new: Array) -> Array:
        """Into their place, or added to their tokens; then rows of others are zeros."""
        if rows.token_N is None:
            return self.write(a, new)
        return a.at[self._slice(rows.token_N)].add(new)

    def weight_B1(self, rows: Rows) -> Array | None:
        return None if rows.weight_N is None else self.read(rows.weight_N[:, None])

    def _slice(self, rows: Array) -> Array:
        return lax.dynamic_slice_in_dim(rows, self.start, len(self.keep_B1))


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
