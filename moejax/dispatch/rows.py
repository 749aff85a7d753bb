"""Where the rows lie that the experts work on: sorted, in buffers, or still among the tokens."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array


class Rows(NamedTuple):
    """Rows in the order of their experts: load_E[0] of expert 0, then those of expert 1, and so on.

    Attributes:
      x: [N, D], the rows themselves; or [E, C, D], a buffer for each expert; or, with the other
        two, the tokens [T, D]: row n is x[token_N[n]], and its output belongs to that token.
      token_N: int32.
      weight_N: float32, of each row's output.
    """

    x: Array
    token_N: Array | None = None
    weight_N: Array | None = None

    @property
    def number(self) -> int:
        """N, or E x C."""
        return self.x.size // self.x.shape[-1] if self.token_N is None else len(self.token_N)

    def nothing(self) -> Array:
        """Zeros that lie as the rows do, for sums at tokens float32."""
        return jnp.zeros_like(self.x, None if self.token_N is None else jnp.float32)

    def all(self) -> Array:
        """[N, D] or [E, C, D]."""
        return self.x if self.token_N is None else self.x[self.token_N]

    def weight_N1(self) -> Array | None:
        return None if self.weight_N is None else self.weight_N[:, None]

    def results(self, y: Array, load_E: Array) -> Any:
        """Of the outputs, row by row: as `grouped_ffn` returns them, or `tokens_ffn`."""
        if self.token_N is None:
            return y
        y = zero_tail(y, load_E).astype(jnp.float32)
        expert_N = jnp.searchsorted(jnp.cumsum(load_E), jnp.arange(len(y)), side="right")
        return added_up(y, self.token_N, len(self.x)), added_up(y, expert_N, len(load_E))

    def spread(self, dy: Array) -> Array:
        """Of the outputs' gradients those of the rows."""
        return self._replace(x=dy).all().astype(self.x.dtype)

    def gradients(self, dx: Array, dweight_N1: Array | None, load_E: Array) -> "Rows":
        """Of the gradients row by row: where the rows lie, or summed at their tokens, float32."""
        if self.token_N is None:
            return Rows(dx)
        assert dweight_N1 is not None
        dx, dweight_N1 = zero_tail(dx, load_E), zero_tail(dweight_N1, load_E)
        dx = added_up(dx.astype(jnp.float32), self.token_N, len(self.x))
        return Rows(dx, weight_N=dweight_N1[:, 0])


def added_up(y_NX: Array, at_N: Array, number: int) -> Array:
    """The sum of the rows [N, ...] at each of so many places, which `at_N` names; a row of none of
    them is left out."""
    return jnp.zeros((number, *y_NX.shape[1:]), y_NX.dtype).at[at_N].add(y_NX, mode="drop")


def zero_tail(rows: Array, load_E: Array) -> Array:
    """Zeros in the place of the rows of no expert."""
    if rows.ndim == 3:  # buffers: their free slots hold zeros, and give zeros
        return rows
    return jnp.where((jnp.arange(len(rows)) < load_E.sum())[:, None], rows, 0)
