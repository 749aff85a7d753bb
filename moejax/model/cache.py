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

    def holding(self, kept: Any, segment_BS: jax.Array) -> "Cache":
        """With S tokens more: kept, arrays [L, B, S, heads, width].

        Raises:
          ValueError: S above M. That `used` + S is not above M is for the caller to see to.
        """
        more, slots = segment_BS.shape[1], self.segment_BM.shape[1]
        if more > slots:
            raise ValueError(f"{more} tokens do not fit a cache of {slots} slots")
        return Cache(
            jax.tree.map(lambda a, new: placed(a, new, self.used, 2), self.kept, kept),
            placed(self.segment_BM, segment_BS, self.used, 1),
            self.used + more,
        )


def placed(a: jax.Array, new: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    """`a` with `new` written into it from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(a, new.astype(a.dtype), start, axis)


def seen(cache: Any, kept: Any, start: jax.Array | int) -> Any:
    """One layer's slots [B, M, ...] with what is kept of the tokens [B, S, ...] in their place."""
    return jax.tree.map(lambda a, new: placed(a, new, start, 1), cache, kept)
