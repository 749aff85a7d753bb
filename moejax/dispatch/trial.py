"""Which grouped products a GPU gets: each is run once on experts of the layer's sizes, checked and
timed, and what was found is kept, for later processes too."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.dispatch import kept
from moejax.dispatch.measured import Choice, Measured, fastest, reason
from moejax.dispatch.rows import Rows

TOLERANCE = 0.02  # of norms: bfloat16 is off by 0.005, a row of another expert by 1
NARROW = 128
IDLE, FEW = 1, 2  # of four experts and more: one without rows, one with few
OWN = "the compiler's own"


class Sizes(NamedTuple):
    """Of experts, as far as the choice depends on them.

    Attributes:
      experts, dim, ffn: E, D, F.
      dtype: of rows and weights.
      varying: rows differ along axes of a mesh, inside `shard_map`.
    """

    experts: int
    dim: int
    ffn: int
    dtype: str
    varying: bool = False

    @property
    def rows(self) -> int:
        """512 an expert, as training has them; few enough that a trial takes a layer's memory."""
        return min(512 * self.experts, 32768)


USUAL = Sizes(8, 1024, 1024, "bfloat16")


@cache
def on_gpu(sizes: Sizes, among: tuple[tuple[str, Any], ...]) -> Choice:
    """The fastest of some implementations on this process's GPU whose numbers are right; the first
    where nothing can be measured. The reason has the times, and the day if an earlier process
    measured them; or why there are none."""
    own = among[0][0]
    if jax.default_backend() not in ("gpu", "cuda", "rocm"):
        return Choice(own, f"{OWN}; no GPU is here to measure others on")
    if jax.process_count() > 1:
        return Choice(own, f"{OWN}; processes that measure may not agree")
    if min(sizes.dim, sizes.ffn) < NARROW:
        return Choice(own, f"{OWN}; networks narrower than {NARROW} are not worth a trial")
    # A layer may be being traced, inside meshes and scopes: another thread knows nothing of that.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_kept_or_measured, sizes, among).result()


def _kept_or_measured(sizes: Sizes, among: tuple[tuple[str, Any], ...]) -> Choice:
    key = kept.key_of(sizes._asdict(), [name for name, _ in among])
    if earlier := kept.read(key):
        return earlier
    try:
        measured = _measure(sizes, among)
    except Exception as error:  # most likely no memory is left for a trial
        return Choice(among[0][0], f"{OWN}; nothing could be measured: {reason(error)}")
    if measured.lasting:
        kept.write(key, measured)
    return measured.choice()


def _measure(sizes: Sizes, among: tuple[tuple[str, Any], ...]) -> Measured:
    arguments = _arguments(sizes)
    runs = {name: partial(_jitted(made), *arguments) for name, made in among}
    return fastest(runs, partial(_check, arguments))


def _arguments(sizes: Sizes) -> tuple[Any, ...]:
    """Rows, weights and an uneven load: no boundary and no end on a tile's, an expert without rows
    and one with few, and rows of no expert behind."""
    e, d, f, each = sizes.experts, sizes.dim, sizes.ffn, sizes.rows // sizes.experts
    n = sizes.rows + 5
    keys = jax.random.split(jax.random.key(0), 5)

    def normal(key: Array, *shape: int, scale: float = 1.0) -> Array:
        return (jax.random.normal(key, shape) * scale).astype(sizes.dtype)

    load_E = jnp.full(e, each).at[0].add(-(each // 2 + 3))
    if e > 3:
        load_E = load_E.at[IDLE].set(0).at[FEW].set(5)
    rows_ND, dy_ND = normal(keys[0], n, d), normal(keys[1], n, d)
    ins = (normal(keys[2], e, d, f, scale=d**-0.5), normal(keys[3], e, d, f, scale=d**-0.5))
    return rows_ND, ins, normal(keys[4], e, f, d, scale=f**-0.5), load_E, dy_ND


def _jitted(made: Any) -> Callable[..., Any]:
    """Forward and backward: outputs, and gradients by rows, input weights and output weights."""

    def both(rows_ND: Array, ins: Any, w_out_EFD: Array, load_E: Array, dy_ND: Array) -> Any:
        args = Rows(rows_ND), ins, w_out_EFD, load_E
        y_ND, residuals = made.forward(jax.nn.silu, *args)
        drows, *dws = made.backward(jax.nn.silu, dy_ND, *args, residuals)
        return y_ND, (drows.x, *dws)

    return jax.jit(both)


def _check(arguments: tuple[Any, ...], found: Any) -> None:
    """Of the last expert, on whose rows all loads before have their say, of one with few rows, of
    one without, and of rows of no expert."""
    load_E = np.asarray(arguments[3])
    several = len(load_E) > 3
    for e in (len(load_E) - 1, FEW) if several else (len(load_E) - 1,):
        _check_expert(e, arguments, found)
    y_ND, (dx_ND, dins, dw_out) = found
    total = int(load_E.sum())
    if not bool(jnp.isfinite(y_ND[total:]).all() & jnp.isfinite(dx_ND[total:]).all()):
        raise ValueError("rows of no expert give what is not finite")
    if several and any(bool(jnp.any(dw[IDLE] != 0)) for dw in (*dins, dw_out)):
        raise ValueError("the weights of an expert without rows get a gradient")


def _check_expert(e: int, arguments: tuple[Any, ...], found: Any) -> None:
    rows_ND, (w_in, w_gate), w_out, load_E, dy_ND = arguments
    end = int(load_E[: e + 1].sum())
    own = slice(end - int(load_E[e]), end)

    def dense(x: Array, w_in: Array, w_gate: Array, w_out: Array) -> Array:
        return (jax.nn.silu(x @ w_gate) * (x @ w_in)) @ w_out

    y, vjp = jax.vjp(dense, rows_ND[own], w_in[e], w_gate[e], w_out[e])
    dx, *dws = vjp(dy_ND[own])
    y_ND, (dx_ND, (dw_in, dw_gate), dw_out) = found
    pairs = {
        "outputs": (y_ND[own], y),
        "the rows' gradients": (dx_ND[own], dx),
        "the input weights' gradients": (dw_in[e], dws[0]),
        "the gates' gradients": (dw_gate[e], dws[1]),
        "the output weights' gradients": (dw_out[e], dws[2]),
    }
    for what, (got, wanted) in pairs.items():
        got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
        off = float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))
        if not off <= TOLERANCE:
            raise ValueError(f"{what} are off by {off:.2g} of their norm")
