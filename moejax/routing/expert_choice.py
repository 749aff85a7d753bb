"""Expert choice: every expert takes its C best tokens, so balance is exact and tokens may be left
out."""

import math

import jax
import jax.numpy as jnp

from moejax.routing.spec import RouterSpec
from moejax.routing.types import RouterInput, Routing


def expert_choice(r: RouterInput, *, k: int = 2) -> Routing:
    """Each expert takes the C = ceil(k T / E) tokens that like it best (Zhou et al. 2022,
    2202.09368).

    The softmax runs over experts, the choice over tokens; the weight is the raw probability. k is
    the mean number of experts per token (the paper's capacity factor c). Which tokens compete is
    the group (`moe.groups`): with 'batch' or 'sequence' a token's place depends on *later* tokens,
    so a decoder trained so sees the future; with 'position' only tokens at one position of
    different sequences compete, which is causal (Krajewski et al. 2024, 2402.07871).

    Raises:
      ValueError: fewer than E / k tokens in the group, or k > E.
    """
    num_tokens, num_experts = r.logits_TE.shape
    if k * num_tokens < num_experts:
        raise ValueError(
            f"expert_choice: capacity k x tokens / experts = {k} x {num_tokens} / {num_experts} < "
            "1; "
            f"each group needs at least {math.ceil(num_experts / k)} tokens"
        )
    if k > num_experts:
        raise ValueError(f"expert_choice: k={k} is more than the {num_experts} experts; lower k")
    capacity = math.ceil(k * num_tokens / num_experts)
    probs_TE = jax.nn.softmax(r.logits_TE)
    affinity_ET = jnp.where(r.valid_T, jax.lax.stop_gradient(probs_TE.T), -1.0)
    best_EC, token_EC = jax.lax.top_k(affinity_ET, capacity)
    expert_EC = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32)[:, None], token_EC.shape)
    expert_N = jnp.where(best_EC >= 0, expert_EC, num_experts).reshape(-1)
    token_N = token_EC.reshape(-1).astype(jnp.int32)
    weight_N = probs_TE.at[token_N, expert_N].get(mode="fill", fill_value=0.0)
    return Routing(token_N, expert_N, weight_N, jnp.zeros_like(token_N), probs_TE)


ROUTERS = {
    "expert_choice": RouterSpec(
        expert_choice,
        "expert",
        "softmax, raw",
        "exact by design",
        "Zhou et al. 2022, 2202.09368",
        "V-MoE and flaxformer test values",
    ),
}
