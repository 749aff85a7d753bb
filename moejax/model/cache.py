"""What a model keeps of the tokens that it has read, so that the next one costs one token only.

A plain tree of arrays, handed in and returned. It has a fixed number of slots; the tokens of all
rows take the same slots, so rows of other lengths are padded in front.
"""

from typing import Any, NamedTuple

import jax


class Cache(NamedTuple):
    """The first `used` of M slots hold tokens.

    Attributes:
      kept: of each stack of layers, of each block in its unit, what its attention keeps: arrays
        [L, B, M, heads, width] in the compute dtype.
      segment_BM: int32, the document of each token: a token sees those of its own only.
      used: int32.
    """

    kept: Any
    segment_BM: jax.Array
    used: jax.Array


def placed(slots: Any, new: Any, start: jax.Array | int, axis: int) -> Any:
    """Arrays of M slots along `axis`, with what is kept of S tokens written in from `start` on.

    Raises:
      ValueError: S above M. That `start` + S is not above M is for the caller to see to.
    """

    def place(a: jax.Array, new: jax.Array) -> jax.Array:
        if new.shape[axis] > a.shape[axis]:
            raise ValueError(
                f"{new.shape[axis]} tokens do not fit a cache of {a.shape[axis]} slots"
            )
        return jax.lax.dynamic_update_slice_in_dim(a, new, start, axis)

    return jax.tree.map(place, slots, new)
