"""ReMoE: the router is a ReLU, so how many experts a token has is learned, and differentiable."""

import jax
import jax.numpy as jnp

from moejax.routing.metrics import MoeStats
from moejax.routing.spec import LayerSize, RouterSpec
from moejax.routing.types import RouterInput, Routing, token_choice


def remoe(r: RouterInput, *, k: int = 2, order: str = "token_major") -> Routing:
    """Every expert whose relu(logit) is above 0, weighed by it (Wang et al. 2024, 2412.14711).

    k is only the target: the loss `active_l1` (weight 1, the strength is the state lambda) and
    `update_strength` pull the mean number of experts of a token there. At first a token has half of
    them: until the target is reached, some hundred steps, a step costs accordingly more.

    N = T E, so a capacity factor of 1 is a slot for every token; what 1 is to topk, k / E is here.
    Where a capacity binds, a token's assignments stand by falling weight, so that its strongest
    expert is the last one it loses, and earlier tokens go first. That is causal; 'k_major' (the
    strongest of all tokens, then all second ones) leaves fewer tokens behind, and is not.

    sums: l1_E = lambda / k sum_t relu.

    Raises:
      ValueError: k above E; unknown order.
    """
    num_experts = r.logits_TE.shape[1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"remoe: need 1 <= k <= {num_experts} experts, got k={k}")
    scores_TE = jax.nn.relu(r.logits_TE)
    _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(scores_TE), num_experts)
    weight_TK = jnp.take_along_axis(scores_TE, expert_TK, axis=-1)
    expert_TK = jnp.where(weight_TK > 0, expert_TK, num_experts)
    strength = 1.0 if r.state is None else jax.lax.stop_gradient(r.state)
    l1_E = strength / k * jnp.where(r.valid_T[:, None], scores_TE, 0.0).sum(0)
    return token_choice(r, expert_TK, weight_TK, scores_TE, order)._replace(sums={"l1_E": l1_E})


def initial_strength(size: LayerSize, *, strength: float = 1e-8) -> jax.Array:
    """lambda at step 0. The paper's 1e-8 reaches 1e-3 after 64 steps of x 1.2."""
    return jnp.asarray(strength, jnp.float32)


def update_strength(
    strength_L: jax.Array, stats: MoeStats, *, k: int = 2, growth: float = 1.2
) -> jax.Array:
    """lambda x growth^sign((1 - k / E) - S), S = share of zeros.

    S is that of all layers, tokens and experts of the global batch together: one lambda for the
    model, of which every layer has a copy. A batch of padding changes nothing.
    """
    # The same sign in counts, which are exact: too few zeros = more assignments than k a token.
    excess = stats.load_E.sum(dtype=jnp.float32) - k * stats.tokens.sum(dtype=jnp.float32)
    return strength_L * growth ** jnp.sign(excess)


ROUTERS = {
    "remoe": RouterSpec(
        remoe,
        "token",
        "relu, raw",
        "active_l1 loss, strength from the loads (state)",
        "Wang et al. 2024, 2412.14711",
        "the paper's loss on a fixed layer; lambda's step by hand",
        init=initial_strength,
        every_expert=True,
        update=update_strength,
    ),
}
