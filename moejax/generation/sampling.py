"""The next token of each row, from its logits: greedy, or drawn, from the likeliest ones only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are drawn. Arrays, so that other values are the same program.

    Attributes:
      temperature: float32; 0 = greedy, the largest logit.
      top_p: float32, of the nucleus; 1 = all tokens.
      seed_B: int32, of each row. A row's draws depend on its own seed alone.
    """

    temperature: Any
    top_p: Any
    seed_B: Any


def checked(temperature: float, top_p: float) -> tuple[float, float]:
    """The same values. Raises ValueError for a negative temperature, and top_p outside (0, 1]."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]; 1 = all tokens")
    return temperature, top_p


def sample(logits_BV: jax.Array, how: Sampling, count: jax.Array | int) -> jax.Array:
    """int32 [B]: one token for each row; `count` is the number of the draw."""
    logits_BV = logits_BV.astype(jnp.float32)
    greedy = how.temperature <= 0
    warm_BV = logits_BV / jnp.where(greedy, 1.0, how.temperature)
    warm_BV = jnp.where(nucleus(warm_BV, how.top_p), warm_BV, -jnp.inf)

    def draw(seed: jax.Array, warm_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.categorical(key, warm_V)

    drawn_B = jax.vmap(draw)(how.seed_B, warm_BV)
    return jnp.where(greedy, logits_BV.argmax(-1), drawn_B).astype(jnp.int32)


def nucleus(logits_BV: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """bool [B, V]: the fewest tokens, likeliest first, whose probabilities add up to `top_p`
    (Holtzman et al. 2020, 1904.09751)."""
    prob_BV = jax.nn.softmax(logits_BV)
    order_BV = jnp.argsort(-prob_BV, axis=-1, stable=True)
    falling_BV = jnp.take_along_axis(prob_BV, order_BV, axis=-1)
    before_BV = jnp.cumsum(falling_BV, axis=-1) - falling_BV
    # 1 is all of them, whatever the sum of many small numbers comes to.
    kept_BV = (before_BV < top_p) | (jnp.asarray(top_p) >= 1)
    row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return jnp.zeros_like(kept_BV).at[row_B1, order_BV].set(kept_BV)
