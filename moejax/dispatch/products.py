"""Away from CPUs: the network as one writes it, on products that know which rows are whose."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moejax.dispatch import hopper
from moejax.dispatch.rows import Rows, zero_tail

Activation = Callable[[Array], Array]

# Of the TPU kernel: rows are a multiple of the first; the others are the largest that leave room on
# the chip for two buffers of each operand.
TILES = (128, 1024, 1024)


class Products(NamedTuple):
    """dot: (x, w_EXY, load_E) -> y. of_rows: (dy, w_EXY, load_E) -> dx. of_weights: (x, w_EXY, dy,
    load_E) -> dw_EXY. Rows past sum(load_E) are finite numbers, and may give any."""

    dot: Callable[..., Array]
    of_rows: Callable[..., Array]
    of_weights: Callable[..., Array]


def hidden_of(
    activation: Activation, weight_N1: Array | None, x_in: Array, x_gate: Array | None = None
) -> Array:
    """The hidden rows, times the weight that their outputs have."""
    hidden = activation(x_in) if x_gate is None else activation(x_gate) * x_in
    return hidden if weight_N1 is None else (hidden * weight_N1).astype(hidden.dtype)


def forward(products: Products, activation, rows: Rows, ins, w_out_EFD, load_E):
    """Outputs, and the hidden rows before the activation; see `grouped_ffn`."""
    x = rows.all()
    pre = tuple(products.dot(x, w, load_E) for w in ins)
    y = products.dot(hidden_of(activation, rows.weight_N1(), *pre), w_out_EFD, load_E)
    return rows.results(y, load_E), pre


def backward(products: Products, activation, dy, rows: Rows, ins, w_out_EFD, load_E, pre):
    """Gradients by the rows, the input weights and the output weights."""

    def transposed(x, w, dy):
        return products.of_rows(dy, w, load_E), products.of_weights(x, w, dy, load_E)

    x, dy = rows.all(), rows.spread(dy)
    hidden, hidden_vjp = jax.vjp(partial(hidden_of, activation), rows.weight_N1(), *pre)
    dhidden, dw_out_EFD = transposed(hidden, w_out_EFD, dy)
    dweight_N1, *dpre = hidden_vjp(dhidden)
    dx, dins = zip(*map(partial(transposed, x), ins, dpre), strict=True)
    return rows.gradients(sum(dx), dweight_N1, load_E), dins, dw_out_EFD


def compiler_weight_gradient(x: Array, w: Array, dy: Array, load_E: Array) -> Array:
    """x[rows of e]^T dy[rows of e] for each expert, as XLA has it."""
    (dw,) = jax.linear_transpose(lambda w: lax.ragged_dot(x, w, load_E), w)(dy)
    return dw


def kernel_weight_gradient(
    x_NX: Array, w_EXY: Array, dy_NY: Array, load_E: Array, interpret: bool = False
) -> Array:
    """The same, by the transposed kernel of `megablox`."""
    # The kernel cannot say along which mesh axes its result varies.
    if manual_axes(x_NX) | manual_axes(dy_NY):
        return compiler_weight_gradient(x_NX, w_EXY, dy_NY, load_E)
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tail = -len(x_NX) % TILES[0]
    if tail:
        x_NX, dy_NY = (jnp.pad(a, ((0, tail), (0, 0))) for a in (x_NX, dy_NY))
    rows = next(size for size in (512, 256, 128) if len(x_NX) % size == 0)
    tiles = (rows, *(min(most, n) for most, n in zip(TILES[1:], w_EXY.shape[1:], strict=True)))
    return tgmm(x_NX.swapaxes(0, 1), dy_NY, load_E, w_EXY.dtype, tiling=tiles, interpret=interpret)


def manual_axes(a: Array) -> frozenset[str]:
    """The mesh axes of a `shard_map` along which an array differs."""
    return jax.typeof(a).manual_axis_type.varying


def _batched_dot(x_ECX: Array, w_EXY: Array, load_E: Array) -> Array:
    return jnp.einsum("ecx,exy->ecy", x_ECX, w_EXY)


def _batched_weight_gradient(x_ECX: Array, w_EXY: Array, dy_ECY: Array, load_E: Array) -> Array:
    return jnp.einsum("ecx,ecy->exy", x_ECX, dy_ECY)


def _turned(dot: Callable[..., Array]) -> Callable[..., Array]:
    """The gradient of a product's rows, by the product itself."""
    return lambda dy, w_EXY, load_E: dot(dy, w_EXY.swapaxes(1, 2), load_E)


def tokamax_dot(x_NX: Array, w_EXY: Array, load_E: Array) -> Array:
    """tokamax's grouped product, by the kernel that it picks for the device."""
    import tokamax  # here: an extra, and slow to import

    # It leaves what it finds in rows of no expert: on an H100 the weights' gradients were NaN.
    return zero_tail(tokamax.ragged_dot(x_NX, w_EXY, load_E), load_E)


def tokamax_weight_gradient(x_NX: Array, w_EXY: Array, dy_NY: Array, load_E: Array) -> Array:
    _, vjp = jax.vjp(lambda w_EXY: tokamax_dot(x_NX, w_EXY, load_E), w_EXY)
    return vjp(dy_NY)[0]


TOKAMAX = Products(tokamax_dot, _turned(tokamax_dot), tokamax_weight_gradient)
RAGGED = Products(lax.ragged_dot, _turned(lax.ragged_dot), compiler_weight_gradient)
RAGGED_ON_TPU = RAGGED._replace(of_weights=kernel_weight_gradient)
HOPPER = Products(hopper.dot, hopper.of_rows, hopper.of_weights)
BATCHED = Products(_batched_dot, _turned(_batched_dot), _batched_weight_gradient)
