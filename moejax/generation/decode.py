"""The loop: prompts are read at once, then every row writes a token at a time, on the device."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.generation.sampling import Sampling, sample
from moejax.model import Transformer
from moejax.model.cache import Cache
from moejax.model.transformer import logits


class Prompts(NamedTuple):
    """Rows of text that end together: shorter ones are padded in front.

    token_BP: int32. valid_BP: bool, True = a real token; a row without one only fills the batch.
    """

    token_BP: np.ndarray
    valid_BP: np.ndarray


def pad(prompts: Sequence[np.ndarray], rows: int, multiple: int = 1) -> Prompts:
    """`Prompts` of so many rows, of the longest one's length rounded up to a multiple."""
    length = max(len(prompt) for prompt in prompts)
    length = -(-length // multiple) * multiple
    padded = Prompts(np.zeros((rows, length), np.int32), np.zeros((rows, length), bool))
    for row, prompt in enumerate(prompts):
        padded.token_BP[row, length - len(prompt) :] = prompt
        padded.valid_BP[row, length - len(prompt) :] = True
    return padded


class Writing(NamedTuple):
    """Where the loop is: `done` tokens of each row are written; `ended_B`: it has ended."""

    done: jax.Array
    token_BN: jax.Array
    ended_B: jax.Array
    cache: Cache


def generate(
    model: Transformer,
    router_state: jax.Array | None,
    prompts: Prompts,
    how: Sampling,
    *,
    tokens: int,
    stop: int,
) -> jax.Array:
    """What follows each prompt, int32 [B, tokens], as repeated passes over the whole text would
    have it.

    Args:
      model: in which nothing drops and no token's routing looks at later ones.
      router_state: as evaluation has it; it stays as it is.
      prompts: the rows.
      how: the draws.
      tokens: N, at most so many for each row.
      stop: the id that ends a row's text; behind it a row holds nothing else.
    """
    valid_BP = jnp.asarray(prompts.valid_BP)
    (rows, length), real_B = valid_BP.shape, valid_BP.sum(1, dtype=jnp.int32)
    place_BP = jnp.arange(length)[None] - (length - real_B[:, None])
    logits_B1V, cache = model.extend(
        model.empty_cache(rows, length + tokens - 1),
        jnp.asarray(prompts.token_BP),
        segment_BS=jnp.where(valid_BP, 0, 1),  # padding is seen by padding only
        position_BS=jnp.maximum(place_BP, 0),
        valid_BS=valid_BP,
        router_state=router_state,
        head=lambda x_BSD, w_DV: logits(x_BSD[:, -1:], w_DV),
    )

    def written(w: Writing, logits_B1V: jax.Array, cache: Cache) -> Writing:
        token_B = jnp.where(w.ended_B, stop, sample(logits_B1V[:, 0], how, w.done))
        token_BN = jax.lax.dynamic_update_slice(w.token_BN, token_B[:, None], (0, w.done))
        return Writing(w.done + 1, token_BN, w.ended_B | (token_B == stop), cache)

    def step(w: Writing) -> Writing:
        logits_B1V, cache = model.extend(
            w.cache,
            jax.lax.dynamic_slice_in_dim(w.token_BN, w.done - 1, 1, axis=1),
            segment_BS=jnp.zeros((rows, 1), jnp.int32),
            position_BS=(real_B + w.done - 1)[:, None],
            valid_BS=~w.ended_B[:, None],
            router_state=router_state,
        )
        return written(w, logits_B1V, cache)

    nothing_BN = jnp.full((rows, tokens), stop, jnp.int32)
    start = Writing(jnp.zeros((), jnp.int32), nothing_BN, real_B == 0, cache)
    first = written(start, logits_B1V, cache)
    more = jax.lax.while_loop(lambda w: (w.done < tokens) & ~w.ended_B.all(), step, first)
    return more.token_BN
