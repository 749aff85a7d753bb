"""Soft MoE: experts work on mixtures of tokens, so nothing is chosen and nothing dropped.

Puigcerver et al. 2023, 2308.00951.

It is no router: there are no assignments, hence this small path of its own. It mixes all tokens of
a sequence, later ones into earlier ones: in a decoder's training it sees the future.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import ModelConfig, MoeConfig
from moejax.dispatch import ACTIVATIONS, Experts, experts_batched
from moejax.model.layers import FeedForward, initial
from moejax.routing import MoeStats, Recorded
from moejax.routing.metrics import sequence_balance


class SoftParams(NamedTuple):
    """Weights of one layer: float32 phi_DZ, Z = E x slots, expert by expert, and scale [1]; the
    experts' in the compute dtype."""

    phi_DZ: jax.Array
    scale_1: jax.Array
    experts: Experts


def soft_moe(
    p: SoftParams, x_BSD: jax.Array, *, valid_BS: jax.Array, activation: str = "swiglu"
) -> tuple[jax.Array, MoeStats]:
    """One Soft MoE layer, each sequence by itself.

        l_SZ = l2norm(x) . (scale l2norm(phi))
        x_ZD = softmax_S(l)^T x;  y_ZD = FFN_expert(z)(x_Z);  y_SD = softmax_Z(l) y_Z

    Args:
      p: weights.
      x_BSD: tokens in the compute dtype.
      valid_BS: bool; other tokens are mixed into no slot and get zeros.
      activation: a key of ACTIVATIONS.

    Returns:
      y_BSD in x's dtype, and statistics: see `soft_stats`.
    """
    num_experts, rows = p.experts.w_in_EDF.shape[0], x_BSD.shape[0]
    phi_DZ = p.scale_1[0] * l2norm(p.phi_DZ, axis=0)
    logits_BSZ = jnp.einsum(
        "bsd,dz->bsz",
        l2norm(x_BSD.astype(jnp.float32), axis=-1),
        phi_DZ,
        precision=jax.lax.Precision.HIGHEST,
    )
    valid_BS1 = valid_BS[..., None]
    # Not -inf: in a sequence of padding every weight would be 0 / 0.
    dispatch_BSZ = jax.nn.softmax(jnp.where(valid_BS1, logits_BSZ, -1e30), axis=1) * valid_BS1
    combine_BSZ = jax.nn.softmax(logits_BSZ, axis=2) * valid_BS1
    x_BZD = jnp.einsum("bsz,bsd->bzd", dispatch_BSZ.astype(x_BSD.dtype), x_BSD)
    # [B, E slots, D] to the experts' buffers [E, B slots, D], and back.
    dim = x_BSD.shape[2]
    x_EBCD = jnp.moveaxis(x_BZD.reshape(rows, num_experts, -1, dim), 1, 0)
    y_ECD = experts_batched(p.experts, x_EBCD.reshape(num_experts, -1, dim), activation)
    y_BECD = jnp.moveaxis(y_ECD.reshape(x_EBCD.shape), 0, 1).astype(jnp.float32)
    y_BSD = jnp.einsum("bsz,bzd->bsd", combine_BSZ, y_BECD.reshape(rows, -1, dim))
    stats = soft_stats(logits_BSZ, combine_BSZ, y_BECD, valid_BS)
    return y_BSD.astype(x_BSD.dtype), stats


def l2norm(a: jax.Array, axis: int) -> jax.Array:
    """a / |a| along an axis; 0 stays 0. Without it the softmaxes collapse as D grows."""
    return a * jax.lax.rsqrt(jnp.square(a).sum(axis, keepdims=True) + 1e-6)


def soft_stats(
    logits_BSZ: jax.Array, combine_BSZ: jax.Array, y_BECD: jax.Array, valid_BS: jax.Array
) -> MoeStats:
    """`MoeStats` of a Soft MoE layer.

    load_E is what an expert's slots weigh: each slot is one token's worth, so it is slots x
    sequences for all of them; nothing is dropped. A token's probability of an expert is the weight
    of its slots in the token's output; first_E counts the largest.
    """
    num_experts, slots = y_BECD.shape[1:3]
    prob_BSE = combine_BSZ.reshape(*valid_BS.shape, num_experts, slots).sum(-1)
    fixed_BSE = jax.lax.stop_gradient(prob_BSE)
    entropy = -(fixed_BSE * jnp.log(jnp.where(fixed_BSE > 0, fixed_BSE, 1.0))).sum()
    z_BS = jnp.square(jax.nn.logsumexp(logits_BSZ, axis=-1))
    balance_B, real_B = sequence_balance(prob_BSE, valid_BS, 1)
    sequences = real_B.sum(dtype=jnp.int32)
    load_E = jnp.full(num_experts, slots, jnp.int32) * sequences
    mixed_BZ = jax.lax.stop_gradient(combine_BSZ).sum(1)
    mixed_BEC = mixed_BZ.reshape(y_BECD.shape[:3])
    largest_BS = jnp.where(valid_BS, fixed_BSE.argmax(-1), num_experts)
    return MoeStats(
        tokens=valid_BS.sum(dtype=jnp.int32),
        load_E=load_E,
        first_E=jnp.zeros(num_experts, jnp.int32).at[largest_BS].add(1, mode="drop"),
        kept_E=load_E,
        dropped_K=jnp.zeros(1, jnp.int32),
        left_behind=jnp.zeros((), jnp.int32),
        prob_E=prob_BSE.sum((0, 1)),
        z=jnp.where(valid_BS, z_BS, 0.0).sum(),
        entropy=entropy,
        sequences=sequences,
        sequence_balance=balance_B.sum(),
        weight_E=mixed_BEC.sum((0, 2)),
        output_ED=jnp.einsum("bec,becd->ed", mixed_BEC, jax.lax.stop_gradient(y_BECD)),
        own={},
    )


class SoftMoE(nnx.Module):
    """A Soft MoE feed-forward layer: called like `moejax.MoE`, and returns the same.

    Args:
      model: dim, ffn, activation, init_scale and dtype are used.
      config: experts, slots (of each expert), ffn, shared.
      rngs: of the initial weights.
    """

    def __init__(self, model: ModelConfig, config: MoeConfig, *, rngs: nnx.Rngs) -> None:
        if config.slots < 1:
            raise ValueError(f"SoftMoE: moe.slots={config.slots} must be at least 1")
        self.dtype = jnp.dtype(model.dtype)
        self.activation = model.activation
        e, d, f, scale = config.experts, model.dim, config.ffn or model.ffn, model.init_scale
        self.phi_DZ = initial(rngs, (d, e * config.slots), (0,), scale * config.router_scale)
        self.scale_1 = nnx.Param(jnp.ones(1))
        self.w_in_EDF = initial(rngs, (e, d, f), (1,), scale)
        self.w_out_EFD = initial(rngs, (e, f, d), (1,), scale)
        gated = ACTIVATIONS[model.activation][1]
        self.w_gate_EDF = initial(rngs, (e, d, f), (1,), scale) if gated else None
        self.shared = FeedForward(model, config.shared * f, rngs) if config.shared else None

    def __call__(
        self,
        x_BSD: jax.Array,
        *,
        valid_BS: jax.Array | None = None,
        token_BS: jax.Array | None = None,
        key: jax.Array | None = None,
        state: Any = None,
        recorded: Recorded | None = None,
        record: bool = False,
    ) -> tuple[jax.Array, MoeStats]:
        """y_BSD in x's dtype and this layer's `MoeStats`; the other arguments are for routers, and
        not looked at."""
        valid_BS = jnp.ones(x_BSD.shape[:2], bool) if valid_BS is None else valid_BS
        gate = None if self.w_gate_EDF is None else self.w_gate_EDF[...]
        experts = Experts(self.w_in_EDF[...], self.w_out_EFD[...], gate)
        experts = jax.tree.map(lambda w: w.astype(self.dtype), experts)
        p = SoftParams(self.phi_DZ[...], self.scale_1[...], experts)
        y_BSD, stats = soft_moe(
            p, x_BSD.astype(self.dtype), valid_BS=valid_BS, activation=self.activation
        )
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD.astype(self.dtype))
        return y_BSD.astype(x_BSD.dtype), stats
