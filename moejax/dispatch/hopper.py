"""Grouped products on NVIDIA's Hopper, by the kernels that JAX ships: 16-bit rows, wide networks.

Tiles are fixed here, where the kernels' own files search for them: a search compiles a hundred
kernels, and `grouped.choose` measures what comes of these beside the other implementations.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

# Of the output, and of the dimension that is summed: a warpgroup's accumulator of 128 x 128 float32
# fills half of its registers, four steps of two operands 128 KiB of the 227 KiB of shared memory.
TILE, SUMMED, STEPS = 128, 64, 4
# The kernels take rows in such multiples only.
ROWS = 8


def dot(x_NX: Array, w_EXY: Array, load_E: Array) -> Array:
    """x[rows of e] w[e] for each expert; rows past the load give 0."""
    return _product(x_NX, w_EXY, load_E, turned=False)


def of_rows(dy_NY: Array, w_EXY: Array, load_E: Array) -> Array:
    """dy[rows of e] w[e]^T, no weight being copied for it."""
    return _product(dy_NY, w_EXY, load_E, turned=True)


def of_weights(x_NX: Array, w_EXY: Array, dy_NY: Array, load_E: Array) -> Array:
    """x[rows of e]^T dy[rows of e]; rows past the load must be finite."""
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    _check(x_NX, w_EXY)
    tiles = _tiles(w_EXY.shape[2])
    return transposed_ragged_dot(_filled(x_NX), _filled(dy_NY), group_sizes=load_E, **tiles)


def _product(x: Array, w_EXY: Array, load_E: Array, turned: bool) -> Array:
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    _check(x, w_EXY)
    tiles = _tiles(w_EXY.shape[1 if turned else 2])
    y = ragged_dot(_filled(x), w_EXY, group_sizes=load_E, transpose_rhs=turned, **tiles)[: len(x)]
    # The kernel leaves those rows as it finds them, NaN for all one knows; the one for the weights
    # multiplies its neighbours by 0.
    return jnp.where((jnp.arange(len(y)) < load_E.sum())[:, None], y, 0)


def _filled(rows: Array) -> Array:
    return jnp.pad(rows, ((0, -len(rows) % ROWS), (0, 0)))


def _tiles(columns: int) -> dict[str, Any]:
    # Neighbours in the grid share operands in the cache: so many tiles of columns go together.
    together = next(n for n in (8, 4, 2, 1) if columns // TILE % n == 0)
    return {
        "block_m": TILE,
        "block_n": TILE,
        "block_k": SUMMED,
        "max_concurrent_steps": STEPS,
        "grid_block_n": together,
    }


def _check(x: Array, w_EXY: Array) -> None:
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"its kernels take 16-bit numbers, not {x.dtype}")
    if any(width % TILE for width in w_EXY.shape[1:]):
        raise NotImplementedError(f"widths {w_EXY.shape[1:]} are not multiples of {TILE}")
