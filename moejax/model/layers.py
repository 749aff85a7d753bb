"""The parts of a transformer that have nothing to do with experts: norm, attention, dense
feed-forward.

Parameters are float32 and named by their axes; the last part of a name is what `moejax.sharding`
looks up. Matmuls run in the model's compute dtype.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import ModelConfig
from moejax.dispatch import ACTIVATIONS, Shared, shared_beside
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


class Mask(NamedTuple):
    """Which of M tokens each of S tokens sees: seen_BSM, bool.

    in_order: M = S and no token sees a later one, so that scores of later ones need no computing.
    """

    seen_BSM: jax.Array
    in_order: bool = False


# Where tokens are in order: so many blocks of queries, each against the tokens up to its end. That
# leaves out 3/8 of all scores; 8 blocks would leave out 7/16, but of ever smaller products.
PARTS = 4


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


def attend(
    q_BSHC: jax.Array, k_BMGC: jax.Array, v_BMGA: jax.Array, mask: Mask, block: int = 0
) -> jax.Array:
    """softmax(q k / sqrt(C)) v, the softmax in float32: y_BSHA. Each kv head serves H / G heads.

    block > 0: that many queries at a time, and their scores again in the backward pass, so that no
    more than [B, H, block, M] scores are there at once. The same values, up to rounding.
    """
    B, S, H, C = q_BSHC.shape
    G = k_BMGC.shape[2]
    # Heads in front: what is multiplied lies together.
    q_BGRSC = jnp.moveaxis(q_BSHC.reshape(B, S, G, H // G, C) * C**-0.5, 1, 3)
    k_BGMC, v_BGMA = jnp.swapaxes(k_BMGC, 1, 2), jnp.swapaxes(v_BMGA, 1, 2)
    part = S // PARTS
    cut = mask.in_order and S % PARTS == 0 and (not block or part <= block or part % block == 0)
    ends = range(part, S + 1, part) if cut else [S]
    parts, start = [], 0
    for end in ends:
        seen = end if cut else k_BMGC.shape[1]
        parts.append(
            _in_blocks(
                q_BGRSC[:, :, :, start:end],
                k_BGMC[:, :, :seen],
                v_BGMA[:, :, :seen],
                mask.seen_BSM[:, start:end, :seen],
                block,
            )
        )
        start = end
    y_BSGRA = jnp.moveaxis(jnp.concatenate(parts, axis=3), 3, 1)
    return y_BSGRA.reshape(B, S, H, -1)


def _in_blocks(
    q_BGRSC: jax.Array, k_BGMC: jax.Array, v_BGMA: jax.Array, seen_BSM: jax.Array, block: int
) -> jax.Array:
    if not block or block >= q_BGRSC.shape[3]:
        return _attend(q_BGRSC, k_BGMC, v_BGMA, seen_BSM)

    def cut(a: jax.Array, axis: int) -> jax.Array:  # blocks in front
        parts = (*a.shape[:axis], -1, block, *a.shape[axis + 1 :])
        return jnp.moveaxis(a.reshape(parts), axis, 0)

    part = jax.checkpoint(lambda q, seen: _attend(q, k_BGMC, v_BGMA, seen))
    y_nBGRsA = jax.lax.map(lambda xs: part(*xs), (cut(q_BGRSC, 3), cut(seen_BSM, 1)))
    y_BGRnsA = jnp.moveaxis(y_nBGRsA, 0, 3)
    return y_BGRnsA.reshape(*q_BGRSC.shape[:4], v_BGMA.shape[-1])


def _attend(
    q_BGRsC: jax.Array, k_BGMC: jax.Array, v_BGMA: jax.Array, seen_BsM: jax.Array
) -> jax.Array:
    """Weights are divided by their sum behind the product with the values: a pass less over
    [s, M]."""
    f32 = jnp.float32
    score_BGRsM = jnp.einsum("bgrsc,bgmc->bgrsm", q_BGRsC, k_BGMC, preferred_element_type=f32)
    score_BGRsM = jnp.where(seen_BsM[:, None, None], score_BGRsM, -0.7 * jnp.finfo(f32).max)
    # Softmax is the same whatever is taken off, so the maximum needs no gradient.
    most_BGRs1 = jax.lax.stop_gradient(score_BGRsM.max(-1, keepdims=True))
    weight_BGRsM = jnp.exp(score_BGRsM - most_BGRs1)
    y_BGRsA = jnp.einsum(
        "bgrsm,bgma->bgrsa", weight_BGRsM.astype(v_BGMA.dtype), v_BGMA, preferred_element_type=f32
    )
    return (y_BGRsA / weight_BGRsM.sum(-1, keepdims=True)).astype(v_BGMA.dtype)


def attention_mask(
    segment_BS: jax.Array,
    seen_BM: jax.Array | None = None,
    start: jax.Array | int = 0,
    *,
    causal: bool = True,
) -> Mask:
    """A token sees those of its own document; if causal, only those up to itself.

    seen_BM: the documents of all that is there to see, in which the tokens themselves begin at
    `start`; None = the tokens are all.
    """
    alone = seen_BM is None
    seen_BM = segment_BS if seen_BM is None else seen_BM
    same_BSM = segment_BS[:, :, None] == seen_BM[:, None]
    if not causal:
        return Mask(same_BSM)
    place_S, place_M = start + jnp.arange(segment_BS.shape[1]), jnp.arange(seen_BM.shape[1])
    return Mask((place_M[None] <= place_S[:, None])[None] & same_BSM, in_order=alone)


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
