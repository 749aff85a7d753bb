"""The parts of a transformer that have nothing to do with experts: norm, attention, dense
feed-forward.

Parameters are float32 and named by their axes; the last part of a name is what `moejax.sharding`
looks up. Matmuls run in the model's compute dtype.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import ModelConfig
from moejax.dispatch import ACTIVATIONS, Shared, shared_beside
from moejax.model.attend import Mask, attend
from moejax.sharding import constrain


def initial(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    inputs: tuple[int, ...],
    scale: float,
) -> nnx.Param:
    """Truncated normal of variance scale / fan-in, cut at 2 sd; `inputs` are the axes summed
    over."""
    fan_in = 1
    for axis in inputs:
        fan_in *= shape[axis]
    # 0.8796 is the sd of a unit normal cut at 2 sd.
    std = (scale / fan_in) ** 0.5 / 0.87962566103423978
    return nnx.Param(std * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embedded(embed_VD: jax.Array, token_BS: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The tokens' rows of a table, x_BSD in `dtype`.

    A token's gradients are summed in the table's own float32. In bfloat16 the sum of many stops
    growing: of 8,192 bytes of text 1,551 are spaces, whose gradient was off by a sixth.
    """
    # The table whole along D: else what is looked up lies cut along D, and is moved whole.
    return constrain(embed_VD.astype(dtype), "embed_read_VD")[token_BS]


def _embedded(embed_VD: jax.Array, token_BS: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, Any]:
    # The table itself for its shape: it is a parameter, and lies there anyway.
    return embedded(embed_VD, token_BS, dtype), (embed_VD, token_BS)


def _embedded_transposed(
    dtype: jnp.dtype, given: tuple[jax.Array, jax.Array], dx_BSD: jax.Array
) -> tuple[jax.Array, None]:
    embed_VD, token_BS = given
    nothing_VD = constrain(jnp.zeros_like(embed_VD), "embed_read_VD")
    return nothing_VD.at[token_BS].add(dx_BSD.astype(embed_VD.dtype)), None


embedded.defvjp(_embedded, _embedded_transposed)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 (Zhang & Sennrich 2019, 1910.07467)."""

    def __init__(self, dim: int) -> None:
        self.scale_D = nnx.Param(jnp.ones(dim))

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return _normed(x_BSD, self.scale_D[...])


@partial(
    jax.checkpoint, prevent_cse=False
)  # keeps its input alone: the rest is quick to make again
def _normed(x_BSD: jax.Array, scale_D: jax.Array) -> jax.Array:
    x = x_BSD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return (x * scale_D[None, None]).astype(x_BSD.dtype)


def rope(x_BSHA: jax.Array, position_BS: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding on the two halves of each head (Su et al. 2021, 2104.09864)."""
    half = x_BSHA.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (position_BS[..., None].astype(jnp.float32) * frequency[None, None])[:, :, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x_BSHA.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BSHA.dtype)


# What attention keeps of tokens for later ones to see: arrays [B, S, heads, width].
Kept = tuple[jax.Array, ...]


class Attention(nnx.Module):
    """Grouped-query attention inside each document. Axes: A = width of a head, G = kv
    heads.

    With model.qk_norm queries and keys are normed before they are turned, over all heads together
    (OLMoE, Muennighoff et al. 2024, 2409.02060; per head it would be another model).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        d, h, g, a = config.dim, config.heads, config.key_value_heads, config.width
        self.w_query_DHA = initial(rngs, (d, h, a), (0,), config.init_scale)
        self.w_key_DGA = initial(rngs, (d, g, a), (0,), config.init_scale)
        self.w_value_DGA = initial(rngs, (d, g, a), (0,), config.init_scale)
        self.w_out_HAD = initial(rngs, (h, a, d), (0, 1), config.init_scale)
        self.query_norm = RMSNorm(h * a) if config.qk_norm else None
        self.key_norm = RMSNorm(g * a) if config.qk_norm else None

    def keep(self, x_BSD: jax.Array, position_BS: jax.Array) -> Kept:
        """Keys and values, by one product."""
        w_DnGA = jnp.stack([self.w_key_DGA[...], self.w_value_DGA[...]], axis=1)
        kv_BSnGA = jnp.einsum("bsd,dnga->bsnga", x_BSD, w_DnGA.astype(x_BSD.dtype))
        k_BSGA, v_BSGA = kv_BSnGA[:, :, 0], kv_BSnGA[:, :, 1]
        if self.key_norm is not None:
            k_BSGA = _all_heads(self.key_norm, k_BSGA)
        return rope(k_BSGA, position_BS, self.config.rope_theta), v_BSGA

    def __call__(
        self, x_BSD: jax.Array, seen: Kept, mask: Mask, position_BS: jax.Array
    ) -> jax.Array:
        """What the tokens read in `seen`, what `keep` kept of the M tokens that they may see."""
        k_BMGA, v_BMGA = seen
        dtype = x_BSD.dtype
        q_BSHA = jnp.einsum("bsd,dha->bsha", x_BSD, self.w_query_DHA[...].astype(dtype))
        if self.query_norm is not None:
            q_BSHA = _all_heads(self.query_norm, q_BSHA)
        q_BSHA = rope(q_BSHA, position_BS, self.config.rope_theta)
        y_BSHA = attend(q_BSHA, k_BMGA, v_BMGA, mask, self.config.query_block)
        return jnp.einsum("bsha,had->bsd", y_BSHA, self.w_out_HAD[...].astype(dtype))


def _all_heads(norm: RMSNorm, a_BSHA: jax.Array) -> jax.Array:
    """A norm over all heads of a token together."""
    return norm(a_BSHA.reshape(*a_BSHA.shape[:2], -1)).reshape(a_BSHA.shape)


class FeedForward(nnx.Module):
    """A dense feed-forward network, also the form of the shared experts."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs) -> None:
        self.config = config
        d, scale = config.dim, config.init_scale
        self.w_in_DF = initial(rngs, (d, width), (0,), scale)
        self.w_out_FD = initial(rngs, (width, d), (0,), scale)
        gated = ACTIVATIONS[config.activation][1]
        self.w_gate_DF = initial(rngs, (d, width), (0,), scale) if gated else None

    def weights(self) -> Shared:
        """As the layer with experts takes them."""
        gate = None if self.w_gate_DF is None else self.w_gate_DF[...]
        return Shared(self.w_in_DF[...], self.w_out_FD[...], gate)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        p = jax.tree.map(lambda w: w.astype(x_BSD.dtype), self.weights())
        return shared_beside(p, x_BSD, self.config.activation, spread=False).alone()
