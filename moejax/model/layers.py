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
        """Keys and values."""
        dtype = x_BSD.dtype
        k_BSGA = jnp.einsum("bsd,dga->bsga", x_BSD, self.w_key_DGA[...].astype(dtype))
        v_BSGA = jnp.einsum("bsd,dga->bsga", x_BSD, self.w_value_DGA[...].astype(dtype))
        if self.key_norm is not None:
            k_BSGA = _all_heads(self.key_norm, k_BSGA)
        return rope(k_BSGA, position_BS, self.config.rope_theta), v_BSGA

    def __call__(
        self, x_BSD: jax.Array, seen: Kept, mask_BSM: jax.Array, position_BS: jax.Array
    ) -> jax.Array:
        """What the tokens read in `seen`, what `keep` kept of the M tokens that they may see."""
        k_BMGA, v_BMGA = seen
        dtype = x_BSD.dtype
        q_BSHA = jnp.einsum("bsd,dha->bsha", x_BSD, self.w_query_DHA[...].astype(dtype))
        if self.query_norm is not None:
            q_BSHA = _all_heads(self.query_norm, q_BSHA)
        q_BSHA = rope(q_BSHA, position_BS, self.config.rope_theta)
        y_BSHA = attend(q_BSHA, k_BMGA, v_BMGA, mask_BSM, self.config.query_block)
        return jnp.einsum("bsha,had->bsd", y_BSHA, self.w_out_HAD[...].astype(dtype))


def _all_heads(norm: RMSNorm, a_BSHA: jax.Array) -> jax.Array:
    """A norm over all heads of a token together."""
    return norm(a_BSHA.reshape(*a_BSHA.shape[:2], -1)).reshape(a_BSHA.shape)


def attend(
    q_BSHC: jax.Array, k_BMGC: jax.Array, v_BMGA: jax.Array, mask_BSM: jax.Array, block: int = 0
) -> jax.Array:
    """softmax(q k / sqrt(C)) v, the softmax in float32: y_BSHA. Each kv head serves H / G heads.

    block > 0: that many queries at a time, and their scores again in the backward pass, so that no
    more than [B, H, block, M] scores are there at once. The same values, up to rounding.
    """

    def queries(q_BsHC: jax.Array, mask_BsM: jax.Array) -> jax.Array:
        return _attend(q_BsHC, k_BMGC, v_BMGA, mask_BsM)

    if not block or block >= q_BSHC.shape[1]:
        return queries(q_BSHC, mask_BSM)

    def cut(a_BSX: jax.Array) -> jax.Array:  # blocks in front
        cut_BnsX = a_BSX.reshape(a_BSX.shape[0], -1, block, *a_BSX.shape[2:])
        return jnp.moveaxis(cut_BnsX, 1, 0)

    part = jax.checkpoint(queries)
    y_nBsHA = jax.lax.map(lambda xs: part(*xs), (cut(q_BSHC), cut(mask_BSM)))
    y_BnsHA = jnp.moveaxis(y_nBsHA, 0, 1)
    return y_BnsHA.reshape(*q_BSHC.shape[:3], v_BMGA.shape[-1])


def _attend(
    q_BsHC: jax.Array, k_BMGC: jax.Array, v_BMGA: jax.Array, mask_BsM: jax.Array
) -> jax.Array:
    if k_BMGC.shape == v_BMGA.shape:
        return jax.nn.dot_product_attention(q_BsHC, k_BMGC, v_BMGA, mask=mask_BsM[:, None])
    # Keys wider than values, which that function refuses; here every head has its own.
    scores_BHsM = jnp.einsum(
        "bshc,bmhc->bhsm", q_BsHC, k_BMGC, preferred_element_type=jnp.float32
    ) / (q_BsHC.shape[-1] ** 0.5)
    scores_BHsM = jnp.where(mask_BsM[:, None], scores_BHsM, -0.7 * jnp.finfo(jnp.float32).max)
    weight_BHsM = jax.nn.softmax(scores_BHsM, axis=-1).astype(v_BMGA.dtype)
    return jnp.einsum("bhsm,bmha->bsha", weight_BHsM, v_BMGA)


def attention_mask(
    segment_BS: jax.Array,
    seen_BM: jax.Array | None = None,
    start: jax.Array | int = 0,
    *,
    causal: bool = True,
) -> jax.Array:
    """bool [B, S, M]: a token sees those of its own document; if causal, only those up to itself.

    seen_BM: the documents of all that is there to see, in which the tokens themselves begin at
    `start`; None = the tokens are all.
    """
    seen_BM = segment_BS if seen_BM is None else seen_BM
    same_BSM = segment_BS[:, :, None] == seen_BM[:, None]
    if not causal:
        return same_BSM
    place_S, place_M = start + jnp.arange(segment_BS.shape[1]), jnp.arange(seen_BM.shape[1])
    return (place_M[None] <= place_S[:, None])[None] & same_BSM


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
