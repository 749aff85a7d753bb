"""Multi-head latent attention: keys and values are made of one narrow vector a token.

DeepSeek-AI 2024, 2405.04434, section 2.1, and 2412.19437, section 2.1.1; the norms of both latents
stand in the released code. Axes: Q = width of the queries' latent, U = of the keys' and values'
latent, R = the part of a head that carries the position, A = the part of one that does not; C = A +
R.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import ModelConfig
from moejax.model.layers import RMSNorm, attend, initial, rope


class LatentAttention(nnx.Module):
    """Attention inside each document.

        q = W_q norm(W_qd x) = [q_A, rope(q_R)]        (q_rank 0: q = W_q x)
        c = norm(W_d x);  k = [W_k c, rope(W_r x)];  v = W_v c

    k's rotary part is one for all heads. Scores are divided by sqrt(A + R). The released weights
    turn neighbouring pairs, ours the two halves: the same up to the order of R.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        d, h, a, r, scale = (
            *(config.dim, config.heads, config.width, config.rope_dim),
            config.init_scale,
        )
        q, u = config.q_rank, config.kv_rank
        self.w_query_DQ = initial(rngs, (d, q), (0,), scale) if q else None
        self.query_norm = RMSNorm(q) if q else None
        self.w_query_QHC = initial(rngs, (q or d, h, a + r), (0,), scale)
        self.w_latent_DU = initial(rngs, (d, u), (0,), scale)
        self.latent_norm = RMSNorm(u)
        self.w_key_UHA = initial(rngs, (u, h, a), (0,), scale)
        self.w_value_UHA = initial(rngs, (u, h, a), (0,), scale)
        self.w_position_DR = initial(rngs, (d, r), (0,), scale)
        self.w_out_HAD = initial(rngs, (h, a, d), (0, 1), scale)

    def __call__(self, x_BSD: jax.Array, mask_BSS: jax.Array, position_BS: jax.Array) -> jax.Array:
        dtype, theta = x_BSD.dtype, self.config.rope_theta
        q_BSQ = x_BSD
        if self.w_query_DQ is not None and self.query_norm is not None:
            q_BSQ = self.query_norm(x_BSD @ self.w_query_DQ[...].astype(dtype))
        q_BSHC = jnp.einsum("bsq,qhc->bshc", q_BSQ, self.w_query_QHC[...].astype(dtype))
        q_BSHA, q_BSHR = jnp.split(q_BSHC, [self.config.width], axis=-1)
        q_BSHC = jnp.concatenate([q_BSHA, rope(q_BSHR, position_BS, theta)], axis=-1)

        c_BSU = self.latent_norm(x_BSD @ self.w_latent_DU[...].astype(dtype))
        k_BSHA = jnp.einsum("bsu,uha->bsha", c_BSU, self.w_key_UHA[...].astype(dtype))
        v_BSHA = jnp.einsum("bsu,uha->bsha", c_BSU, self.w_value_UHA[...].astype(dtype))
        k_BS1R = (x_BSD @ self.w_position_DR[...].astype(dtype))[:, :, None]
        k_BSHR = jnp.broadcast_to(rope(k_BS1R, position_BS, theta), q_BSHR.shape)
        k_BSHC = jnp.concatenate([k_BSHA, k_BSHR], axis=-1)

        y_BSHA = attend(q_BSHC, k_BSHC, v_BSHA, mask_BSS, self.config.query_block)
        return jnp.einsum("bsha,had->bsd", y_BSHA, self.w_out_HAD[...].astype(dtype))
