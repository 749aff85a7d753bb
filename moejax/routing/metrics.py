"""What one forward pass says about its routing: sums over tokens, and the figures made from them.

Every field of `MoeStats` is a sum, so the statistics of two microbatches, or of two devices, add
up to those of the whole batch. Balance losses and router-state updates are functions of these sums:
that is why they do not depend on how a batch was cut.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.routing.decisions import Decisions
from moejax.routing.types import RouterInput, Routing

if TYPE_CHECKING:
    from moejax.dispatch.plan import Plan


class MoeStats(NamedTuple):
    """Sums over the valid tokens of a batch, of one MoE layer (or with a leading layer axis).

    Attributes:
      tokens: int32, valid tokens T'.
      load_E: int32, assignments per expert before dropping.
      first_E: int32, the same for first choices only.
      kept_E: int32, assignments per expert after dropping.
      dropped_K: int32, assignments dropped by rank of choice.
      left_behind: int32, tokens that no expert worked on.
      prob_E: float32, sum over tokens of the scores divided by their sum over experts;
        differentiable.
      z: float32, sum of logsumexp(logits)^2; differentiable.
      entropy: float32, sum over tokens of the entropy of those probabilities, in nats.
      sequences: int32, sequences with at least one valid token.
      sequence_balance: float32, sum over those of E sum_e f_e P_e, f from the token's K highest
        scores, K = assignments over tokens; differentiable.
      weight_E: float32, sum of the weights of what each expert did.
      output_ED: float32, sum of its outputs, weighted.
      own: the router's own sums (`Routing.sums`), some of them differentiable.
      decisions: the routing itself, where it was asked for: no sum, and None else.
    """

    tokens: jax.Array
    load_E: jax.Array
    first_E: jax.Array
    kept_E: jax.Array
    dropped_K: jax.Array
    left_behind: jax.Array
    prob_E: jax.Array
    z: jax.Array
    entropy: jax.Array
    sequences: jax.Array
    sequence_balance: jax.Array
    weight_E: jax.Array
    output_ED: jax.Array
    own: dict[str, jax.Array]
    decisions: Decisions | None = None


def moe_stats(
    r: RouterInput,
    routing: Routing,
    plan: "Plan",
    output_ED: jax.Array | None = None,
    sequences: int = 1,
) -> MoeStats:
    """Statistics of one layer from what its router saw and said, what fitted, and what came out.

    `output_ED` None = not known; `sequences` is how many the tokens are, of equal length.
    """
    num_tokens, num_experts = routing.scores_TE.shape
    choices = plan.choices
    chosen_N = routing.choice_N >= 0
    assigned_N = ((routing.expert_N < num_experts) & chosen_N).astype(jnp.int32)
    kept_N = ((plan.expert_N < num_experts) & chosen_N).astype(jnp.int32)

    def count(index_N: jax.Array, what_N: jax.Array, length: int) -> jax.Array:
        return jnp.zeros(length, what_N.dtype).at[index_N].add(what_N, mode="drop")

    scores_TE = jnp.where(r.valid_T[:, None], routing.scores_TE, 0.0)
    total_T = scores_TE.sum(-1, keepdims=True)
    prob_TE = scores_TE / jnp.where(total_T > 0, total_T, 1.0)
    fixed_TE = jax.lax.stop_gradient(prob_TE)
    entropy_TE = -fixed_TE * jnp.log(jnp.where(fixed_TE > 0, fixed_TE, 1.0))
    z_T = jnp.square(jax.nn.logsumexp(r.logits_TE, axis=-1))
    kept_T = count(routing.token_N, kept_N, num_tokens)
    valid_BS, prob_BSE = (a.reshape(sequences, -1, *a.shape[1:]) for a in (r.valid_T, prob_TE))
    balance_B, real_B = sequence_balance(prob_BSE, valid_BS, min(choices, num_experts))
    return MoeStats(
        tokens=r.valid_T.sum(dtype=jnp.int32),
        load_E=count(routing.expert_N, assigned_N, num_experts),
        first_E=count(routing.expert_N, assigned_N * (routing.choice_N == 0), num_experts),
        kept_E=count(plan.expert_N, kept_N, num_experts),
        dropped_K=count(routing.choice_N, assigned_N - kept_N, choices),
        left_behind=jnp.sum(r.valid_T & (kept_T == 0), dtype=jnp.int32),
        prob_E=prob_TE.sum(0),
        z=jnp.where(r.valid_T, z_T, 0.0).sum(),
        entropy=entropy_TE.sum(),
        sequences=real_B.sum(dtype=jnp.int32),
        sequence_balance=balance_B.sum(),
        weight_E=count(plan.expert_N, jax.lax.stop_gradient(plan.weight_N), num_experts),
        output_ED=jnp.zeros((num_experts, 0))
        if output_ED is None
        else jax.lax.stop_gradient(output_ED),
        own=routing.sums,
    )


def sequence_balance(
    prob_BSE: jax.Array, valid_BS: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """E sum_e f_e P_e of each sequence [B], and which sequences have a valid token, bool [B].

    f counts the k most probable experts of each token, without bias, groups or drops (DeepSeek-V3,
    2412.19437, eq. 17-20); 0 for a sequence of padding.
    """
    _, best_BSK = jax.lax.top_k(jax.lax.stop_gradient(prob_BSE), k)
    chosen_BSE = jax.nn.one_hot(best_BSK, prob_BSE.shape[-1]).sum(2) * valid_BS[..., None]
    tokens_B = jnp.maximum(valid_BS.sum(-1), 1)
    share_BE = chosen_BSE.sum(1) / (k * tokens_B[:, None])
    mean_BE = prob_BSE.sum(1) / tokens_B[:, None]
    return prob_BSE.shape[-1] * (share_BE * mean_BE).sum(-1), valid_BS.any(-1)


def utilisation(load_E: jax.Array) -> jax.Array:
    """Each expert's load over the mean of the last axis: 1 = its fair share, 0 = dead."""
    load_E = load_E.astype(jnp.float32)
    return load_E / jnp.maximum(load_E.mean(-1, keepdims=True), 1e-9)


def max_vio(load_E: jax.Array) -> jax.Array:
    """Maximal violation max n / mean n - 1 over the last axis; 0 at balance (Wang et al. 2024, eq.
    4)."""
    return utilisation(load_E).max(-1) - 1.0


def coefficient_of_variation(load_E: jax.Array) -> jax.Array:
    """Population standard deviation over mean, over the last axis; 0 at balance."""
    load_E = load_E.astype(jnp.float32)
    return load_E.std(-1) / jnp.maximum(load_E.mean(-1), 1e-9)


def normalised_entropy(load_E: jax.Array) -> jax.Array:
    """Entropy of the load over ln E, over the last axis: 1 at balance, 0 when one expert has
    all."""
    load_E = load_E.astype(jnp.float32)
    share_E = load_E / jnp.maximum(load_E.sum(-1, keepdims=True), 1e-9)
    entropy = -(share_E * jnp.log(jnp.where(share_E > 0, share_E, 1.0))).sum(-1)
    return entropy / jnp.log(max(2, load_E.shape[-1]))


def figures(stats: MoeStats) -> dict[str, Any]:
    """The figures that a training log shows, from statistics with a leading layer axis [L, ...].

    Returns:
      max_vio, load_entropy, router_entropy, dead: means over layers; busiest: the share of its
        layer's tokens that the busiest expert of all gets; drop, left_behind: shares over all
        layers; drop_k [K]: the share of each rank of choice that was dropped, per valid token; own:
        those of the router's own sums that are one number a layer, per valid token; load_LE: each
        layer's share of assignments per expert; and by layer max_vio_L, drop_L, load_entropy_L and
        router_entropy_L.
    """
    num_experts = stats.load_E.shape[-1]
    # In float32: summed over its layers, a large batch's assignments pass 2**31.
    assigned = stats.load_E.sum(dtype=jnp.float32)
    layer_tokens = jnp.maximum(stats.tokens.sum(dtype=jnp.float32), 1.0)
    load_L = jnp.maximum(stats.load_E.sum(-1, keepdims=True), 1)
    dropped_L = (stats.load_E - stats.kept_E).sum(-1)
    max_vio_L, load_entropy_L = max_vio(stats.load_E), normalised_entropy(stats.load_E)
    router_entropy_L = stats.entropy / jnp.maximum(stats.tokens, 1) / jnp.log(max(2, num_experts))
    return {
        "max_vio": max_vio_L.mean(),
        "load_entropy": load_entropy_L.mean(),
        "router_entropy": router_entropy_L.mean(),
        "busiest": (stats.load_E.max(-1) / jnp.maximum(stats.tokens, 1)).max(),
        "dead": (stats.load_E == 0).mean(dtype=jnp.float32),
        "drop": (assigned - stats.kept_E.sum(dtype=jnp.float32)) / jnp.maximum(assigned, 1.0),
        "drop_k": stats.dropped_K.sum(0, dtype=jnp.float32) / layer_tokens,
        "left_behind": stats.left_behind.sum(dtype=jnp.float32) / layer_tokens,
        "own": {
            name: sum_L.sum(dtype=jnp.float32) / layer_tokens
            for name, sum_L in stats.own.items()
            if sum_L.ndim == stats.tokens.ndim
        },
        "load_LE": stats.load_E / load_L,
        "max_vio_L": max_vio_L,
        "drop_L": dropped_L / load_L[..., 0],
        "load_entropy_L": load_entropy_L,
        "router_entropy_L": router_entropy_L,
    }
