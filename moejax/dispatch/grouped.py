"""The experts' feed-forward network over rows sorted by expert.

On CPU `lax.ragged_dot` is a masked dense product: E times the work. Here each expert walks over its
own rows in blocks, a whole network per block, so the work follows the load. Other platforms
lower to `lax.ragged_dot`; on TPU, where JAX 0.10 expands its weight gradient to a masked dense
product, that gradient is JAX's own Pallas kernel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Activation = Callable[[Array], Array]
Weights = tuple[Array, ...]  # (w_in_EDF,) or (w_in_EDF, w_gate_EDF)

# An expert takes the blocks of each size that fit, largest first, and rounds up to the last.
# Each size is compiled, so a longer list costs compile time.
BLOCK_SIZES = (512, 128, 32)

# Of the TPU kernel: rows are a multiple of the first; the others are the largest that leave room on
# the chip for two buffers of each operand.
TILES = (128, 1024, 1024)


def grouped_ffn(
    rows_ND: Array,
    w_in_EDF: Array,
    w_gate_EDF: Array | None,
    w_out_EFD: Array,
    load_E: Array,
    activation: Activation = jax.nn.silu,
) -> Array:
    """Applies expert e's network to its rows: the first load_E[0] rows are expert 0's, and so on.

    With a gate the network is (activation(x w_gate) * (x w_in)) w_out (for silu it is SwiGLU,
    arXiv:2002.05202), without one activation(x w_in) w_out. Rows past sum(load_E) give 0 and no
    gradient, whatever they hold. Products accumulate in float32, also the weights' gradients.

    Args:
        rows_ND: inputs, sorted by expert.
        w_in_EDF: input weights, dtype of the rows, like the other two.
        w_gate_EDF: gate weights, or None.
        w_out_EFD: output weights.
        load_E: int32, the number of rows of each expert; may depend on data.
        activation: elementwise.

    Returns:
        Outputs [N, D] in the dtype of the rows.
    """
    ins = (w_in_EDF,) if w_gate_EDF is None else (w_in_EDF, w_gate_EDF)
    return _ffn(activation, *_vary_alike((rows_ND, ins, w_out_EFD, load_E)))


def _axes(a: Array) -> frozenset[str]:
    return jax.typeof(a).manual_axis_type.varying


def _vary_alike(tree: Any) -> Any:
    # Inside shard_map: the gradient of weights that several shards of rows share is summed.
    axes = frozenset[str]().union(*map(_axes, jax.tree.leaves(tree)))

    def vary(a):
        missing = tuple(axes - _axes(a))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(vary, tree)


def _hidden(activation: Activation, x_in: Array, x_gate: Array | None = None) -> Array:
    return activation(x_in) if x_gate is None else activation(x_gate) * x_in


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(activation: Activation, rows_ND: Array, ins: Weights, w_out_EFD: Array, load_E: Array):
    return _forward(activation, rows_ND, ins, w_out_EFD, load_E)[0]


def _forward(activation: Activation, rows_ND: Array, ins: Weights, w_out_EFD: Array, load_E: Array):
    # Chosen inside the two rules: around them, each path would keep the other's residuals.
    args = rows_ND, ins, w_out_EFD, load_E
    y_ND, pre = lax.platform_dependent(
        *args, cpu=partial(_block_forward, activation), default=partial(_ragged_forward, activation)
    )
    return y_ND, (*args, pre)


def _backward(activation: Activation, residuals: Any, dy_ND: Array):
    drows_ND, dins, dw_out_EFD = lax.platform_dependent(
        dy_ND,
        *residuals,
        cpu=partial(_block_backward, activation),
        tpu=partial(_ragged_backward, activation, kernel_weight_gradient),
        default=partial(_ragged_backward, activation, _ragged_weight_gradient),
    )
    return drows_ND, dins, dw_out_EFD, None


_ffn.defvjp(_forward, _backward)


# Every platform but CPU: the network as one writes it, on grouped products.


def _zero_tail(rows: Array, load_E: Array) -> Array:
    return jnp.where((jnp.arange(len(rows)) < load_E.sum())[:, None], rows, 0)


def _ragged_forward(activation, rows_ND, ins, w_out_EFD, load_E):
    x_ND = _zero_tail(rows_ND, load_E)
    pre = tuple(lax.ragged_dot(x_ND, w, load_E) for w in ins)
    y_ND = lax.ragged_dot(_hidden(activation, *pre), w_out_EFD, load_E)
    return _zero_tail(y_ND, load_E), pre


def _ragged_weight_gradient(x: Array, w: Array, dy: Array, load_E: Array) -> Array:
    (dw,) = jax.linear_transpose(lambda w: lax.ragged_dot(x, w, load_E), w)(dy)
    return dw


def kernel_weight_gradient(
    x_NX: Array, w_EXY: Array, dy_NY: Array, load_E: Array, interpret: bool = False
) -> Array:
    """x[rows of e]^T dy[rows of e] for each expert, by the transposed kernel of `megablox`."""
    if _axes(x_NX) | _axes(dy_NY):  # the kernel cannot say along which mesh axes it varies
        return _ragged_weight_gradient(x_NX, w_EXY, dy_NY, load_E)
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tail = -len(x_NX) % TILES[0]
    if tail:
        x_NX, dy_NY = (jnp.pad(a, ((0, tail), (0, 0))) for a in (x_NX, dy_NY))
    rows = next(size for size in (512, 256, 128) if len(x_NX) % size == 0)
    tiles = (rows, *(min(most, n) for most, n in zip(TILES[1:], w_EXY.shape[1:], strict=True)))
    return tgmm(x_NX.swapaxes(0, 1), dy_NY, load_E, w_EXY.dtype, tiling=tiles, interpret=interpret)


def _ragged_backward(activation, weight_gradient, dy_ND, rows_ND, ins, w_out_EFD, load_E, pre):
    def transposed(x, w, dy):
        return lax.ragged_dot(dy, w.swapaxes(1, 2), load_E), weight_gradient(x, w, dy, load_E)

    x_ND, dy_ND = _zero_tail(rows_ND, load_E), _zero_tail(dy_ND, load_E)
    hidden, hidden_vjp = jax.vjp(partial(_hidden, activation), *pre)
    dhidden, dw_out_EFD = transposed(hidden, w_out_EFD, dy_ND)
    dx, dins = zip(*map(partial(transposed, x_ND), ins, hidden_vjp(dhidden)), strict=True)
    return _zero_tail(sum(dx), load_E), dins, dw_out_EFD


# CPU: the same, block by block.


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


def _fold_blocks(expert: Callable, carry: Any, load_E: Array, num_rows: int) -> Any:
    """Equivalent to: for e in range(E): for block of e's rows: carry = expert(e)(block, carry)."""
    end_E = jnp.cumsum(load_E)
    sizes = [min(size, num_rows) for size in BLOCK_SIZES]

    def visit(e, carry):
        step, first, end = expert(e), end_E[e] - load_E[e], end_E[e]
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


def _block_forward(activation, rows_ND, ins, w_out_EFD, load_E):
    def expert(e):
        ins_e, w_out_FD = [w[e] for w in ins], w_out_EFD[e]

        def step(block, carry):
            y_ND, pre = carry
            x_BD = block.read(rows_ND)
            new = [_dot("bd,df->bf", x_BD, w).astype(rows_ND.dtype) for w in ins_e]
            y_BD = _dot("bf,fd->bd", _hidden(activation, *new), w_out_FD)
            return block.write(y_ND, y_BD), tuple(map(block.write, pre, new))

        return step

    num_rows = len(rows_ND)
    pre = tuple(jnp.zeros_like(rows_ND, shape=(num_rows, w.shape[2])) for w in ins)
    return _fold_blocks(expert, (jnp.zeros_like(rows_ND), pre), load_E, num_rows)


def _block_backward(activation, dy_ND, rows_ND, ins, w_out_EFD, load_E, pre):
    def expert(e):
        ins_e, w_out_FD = [w[e] for w in ins], w_out_EFD[e]

        def step(block, carry):
            dx_ND, dins, dw_out_EFD = carry
            x_BD, dy_BD = block.read(rows_ND), block.read(dy_ND)
            hidden_BF, hidden_vjp = jax.vjp(partial(_hidden, activation), *map(block.read, pre))
            dhidden_BF = _dot("bd,fd->bf", dy_BD, w_out_FD).astype(hidden_BF.dtype)
            dpre = hidden_vjp(dhidden_BF)
            dx_BD = sum(map(partial(_dot, "bf,df->bd"), dpre, ins_e))
            dins_e = map(partial(_dot, "bd,bf->df", x_BD), dpre)
            dins = tuple(map(partial(_add_at, e), dins, dins_e))
            dw_out_EFD = _add_at(e, dw_out_EFD, _dot("bf,bd->fd", hidden_BF, dy_BD))
            return block.write(dx_ND, dx_BD), dins, dw_out_EFD

        return step

    zeros = jax.tree.map(partial(jnp.zeros_like, dtype=jnp.float32), (ins, w_out_EFD))
    carry = _fold_blocks(expert, (jnp.zeros_like(rows_ND), *zeros), load_E, len(rows_ND))
    return jax.tree.map(lambda d, a: d.astype(a.dtype), carry, (rows_ND, ins, w_out_EFD))
