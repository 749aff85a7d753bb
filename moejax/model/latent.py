"""Multi-head latent attention: keys and values are made of one narrow vector a token.

DeepSeek-AI 2024, 2405.04434, section 2.1, and 2412.19437, section 2.1.1; the norms of both latents
stand in the released code. Axes: Q = width of the queries' latent, U = of the keys' and values'
latent, R = the part of a head that carries the position, A = the part of one that does not; C = A +
R, X = U + R; M = tokens that are there to see.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import ModelConfig
from moejax.model.attend import Mask, attend
from moejax.model.layers import Kept, RMSNorm, initial, rope


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

    def keep(self, x_BSD: jax.Array, position_BS: jax.Array) -> Kept:
        """c and the rotary part of the key behind each other, X = U + R: all that the heads' keys
        and values are made of."""
        dtype = x_BSD.dtype
        c_BSU = self.latent_norm(x_BSD @ self.w_latent_DU[...].astype(dtype))
        k_BS1R = (x_BSD @ self.w_position_DR[...].astype(dtype))[:, :, None]
        k_BS1R = rope(k_BS1R, position_BS, self.config.rope_theta)
        return (jnp.concatenate([c_BSU[:, :, None], k_BS1R], axis=-1),)

    def __call__(
        self, x_BSD: jax.Array, seen: Kept, mask: Mask, position_BS: jax.Array
    ) -> jax.Array:
        """What the tokens read in `seen`, what `keep` kept of the M tokens that they may see."""
        dtype, theta = x_BSD.dtype, self.config.rope_theta
        q_BSQ = x_BSD
        if self.w_query_DQ is not None and self.query_norm is not None:
            q_BSQ = self.query_norm(x_BSD @ self.w_query_DQ[...].astype(dtype))
        q_BSHC = jnp.einsum("bsq,qhc->bshc", q_BSQ, self.w_query_QHC[...].astype(dtype))
        q_BSHA, q_BSHR = jnp.split(q_BSHC, [self.config.width], axis=-1)
        q_BSHR = rope(q_BSHR, position_BS, theta)
        # One token at a time: to make keys and values of all that it sees would cost M times more.
        read = self._read_latent if x_BSD.shape[1] == 1 else self._read_heads
        y_BSHA = read(q_BSHA, q_BSHR, seen[0], mask)
        return jnp.einsum("bsha,had->bsd", y_BSHA, self.w_out_HAD[...].astype(dtype))

    def _read_heads(
        self, q_BSHA: jax.Array, q_BSHR: jax.Array, seen_BM1X: jax.Array, mask: Mask
    ) -> jax.Array:
        """Attention to every head's own keys and values."""
        dtype, heads = q_BSHA.dtype, self.config.heads
        c_BMU, k_BMR = jnp.split(seen_BM1X[:, :, 0], [self.config.kv_rank], axis=-1)
        k_BMHA = jnp.einsum("bmu,uha->bmha", c_BMU, self.w_key_UHA[...].astype(dtype))
        v_BMHA = jnp.einsum("bmu,uha->bmha", c_BMU, self.w_value_UHA[...].astype(dtype))
        k_BMHR = jnp.broadcast_to(k_BMR[:, :, None], (*k_BMR.shape[:2], heads, k_BMR.shape[-1]))
        q_BSHC = jnp.concatenate([q_BSHA, q_BSHR], axis=-1)
        k_BMHC = jnp.concatenate([k_BMHA, k_BMHR], axis=-1)
        return attend(q_BSHC, k_BMHC, v_BMHA, mask, self.config.query_block)

    def _read_latent(
        self, q_BSHA: jax.Array, q_BSHR: jax.Array, seen_BM1X: jax.Array, mask: Mask
    ) -> jax.Array:
        """Equivalent to `_read_heads`, whose products it takes in another order: q (W_k c) is
        (q W_k) c, and sum w (W_v c) is W_v sum w c. So all heads attend to the latents, as one key
        and value head."""
        dtype, width = q_BSHA.dtype, q_BSHA.shape[-1] + q_BSHR.shape[-1]
        q_BSHU = jnp.einsum("bsha,uha->bshu", q_BSHA, self.w_key_UHA[...].astype(dtype))
        q_BSHX = jnp.concatenate([q_BSHU, q_BSHR], axis=-1)
        # `attend` divides by the root of X, not of A + R.
        q_BSHX = q_BSHX * (q_BSHX.shape[-1] / width) ** 0.5
        y_BSHX = attend(q_BSHX, seen_BM1X, seen_BM1X, mask)
        y_BSHU = y_BSHX[..., : self.config.kv_rank]
        return jnp.einsum("bshu,uha->bsha", y_BSHU, self.w_value_UHA[...].astype(dtype))
