"""The parts of a transformer that have nothing to do with experts: norm, attention, dense
feed-forward.

Parameters are float32 and named by their axes; the last part of a name is what `moejax.sharding`
looks up. Matmuls run in the model's compute dtype.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import ModelConfig
from moejax.dispatch import ACTIVATIONS


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


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 (Zhang & Sennrich 2019, 1910.07467)."""

    def __init__(self, dim: int) -> None:
        self.scale_D = nnx.Param(jnp.ones(dim))

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        x = x_BSD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return (x * self.scale_D[...][None, None]).astype(x_BSD.dtype)


def rope(x_BSHA: jax.Array, position_BS: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding on the two halves of each head (Su et al. 2021, 2104.09864)."""
    half = x_BSHA.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (position_BS[..., None].astype(jnp.float32) * frequency[None, None])[:, :, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x_BSHA.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BSHA.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention inside each document. Axes: A = width of a head, G = kv
    heads."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        d, h, g, a = config.dim, config.heads, config.key_value_heads, config.width
        self.w_query_DHA = initial(rngs, (d, h, a), (0,), config.init_scale)
        self.w_key_DGA = initial(rngs, (d, g, a), (0,), config.init_scale)
        self.w_value_DGA = initial(rngs, (d, g, a), (0,), config.init_scale)
        self.w_out_HAD = initial(rngs, (h, a, d), (0, 1), config.init_scale)

    def __call__(self, x_BSD: jax.Array, mask_BSS: jax.Array, position_BS: jax.Array) -> jax.Array:
        dtype, theta = x_BSD.dtype, self.config.rope_theta
        q_BSHA = jnp.einsum("bsd,dha->bsha", x_BSD, self.w_query_DHA[...].astype(dtype))
        k_BSGA = jnp.einsum("bsd,dga->bsga", x_BSD, self.w_key_DGA[...].astype(dtype))
        v_BSGA = jnp.einsum("bsd,dga->bsga", x_BSD, self.w_value_DGA[...].astype(dtype))
        q_BSHA, k_BSGA = rope(q_BSHA, position_BS, theta), rope(k_BSGA, position_BS, theta)
        y_BSHA = jax.nn.dot_product_attention(q_BSHA, k_BSGA, v_BSGA, mask=mask_BSS[:, None])
        return jnp.einsum("bsha,had->bsd", y_BSHA, self.w_out_HAD[...].astype(dtype))


def attention_mask(segment_BS: jax.Array) -> jax.Array:
    """bool [B, S, S]: query position sees key positions up to itself, in its own document only."""
    causal_SS = jnp.tril(jnp.ones((segment_BS.shape[1],) * 2, bool))
    return causal_SS[None] & (segment_BS[:, :, None] == segment_BS[:, None, :])


class FeedForward(nnx.Module):
    """A dense feed-forward network, also the form of the shared experts."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs) -> None:
        self.config = config
        d, scale = config.dim, config.init_scale
        self.w_in_DF = initial(rngs, (d, width), (0,), scale)
        self.w_out_FD = initial(rngs, (width, d), (0,), scale)
        gated = ACTIVATIONS[config.activation][1]
        self.w_gate_DF = initial(rngs, (d, width), (0,), scale) if gated else None

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        dtype = x_BSD.dtype
        function, _ = ACTIVATIONS[self.config.activation]
        h_BSF = x_BSD @ self.w_in_DF[...].astype(dtype)
        if self.w_gate_DF is None:
            h_BSF = function(h_BSF)
        else:
            h_BSF = function(x_BSD @ self.w_gate_DF[...].astype(dtype)) * h_BSF
        return h_BSF @ self.w_out_FD[...].astype(dtype)
