"""Expert choice: every expert takes its C best tokens, so balance is exact and tokens may be left
out."""

import math
from typing import Any

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
    capacity = _capacity("expert_choice", r, k)
    probs_TE = jax.nn.softmax(r.logits_TE)
    affinity_ET = jnp.where(r.valid_T, jax.lax.stop_gradient(probs_TE.T), -1.0)
    best_EC, token_EC = jax.lax.top_k(affinity_ET, capacity)
    return _take(best_EC >= 0, token_EC, probs_TE)


def expert_choice_capped(
    r: RouterInput, *, k: int = 2, most: int = 3, entropy: float = 1e-3, iterations: int = 100
) -> Routing:
    """Expert choice in which a token gets at most so many experts (Zhou et al. 2022, 2202.09368,
    the paper's capped variant).

    Each expert takes the C = ceil(k T / E) largest entries of its row in the plan A that maximises
    <p, A> + entropy H(A) under: rows of A, the experts', sum to C; columns, the tokens', to at most
    `most`; 0 <= A <= 1. The weight is the raw probability; the plan has no gradient.

    The limit is only as good as the plan: with the paper's values, the defaults, the projections
    are far from their end, and some tokens (up to 5 % for most = 3 on random logits) get one expert
    too many. Iterations in the thousands, or an entropy of .01, come nearer.

    sums: crowded = tokens with more than `most` experts.

    Raises:
      ValueError: as `expert_choice`; E C places that `most` for each token does not fill.
    """
    num_tokens, num_experts = r.logits_TE.shape
    capacity = _capacity("expert_choice_capped", r, k)
    if num_experts * capacity > num_tokens * most:
        raise ValueError(
            f"expert_choice_capped: {num_experts} experts x {capacity} places are more than "
            f"{num_tokens} tokens x most={most}; raise most or lower k"
        )
    probs_TE = jax.nn.softmax(r.logits_TE)
    benefit_ET = jax.lax.stop_gradient(probs_TE.T) / entropy
    plan_ET = capped_plan(benefit_ET, r.valid_T, capacity, most, iterations)
    best_EC, token_EC = jax.lax.top_k(plan_ET, capacity)
    real_EC = best_EC > -jnp.inf
    count_T = jnp.zeros(num_tokens, jnp.int32).at[token_EC].add(real_EC)
    crowded = jnp.sum(count_T > most, dtype=jnp.int32)
    return _take(real_EC, token_EC, probs_TE)._replace(sums={"crowded": crowded})


def capped_plan(
    benefit_ET: jax.Array, valid_T: jax.Array, capacity: int, most: int, iterations: int = 100
) -> jax.Array:
    """log A before its last clip at 0, [E, T]; -inf for invalid tokens.

    A = exp(benefit), projected in turn, in the sense of Kullback and Leibler, on the three limits
    (Dykstra): a factor for each row, one for each column, one for each entry. Each projection
    starts from what the other two left. In logarithms: exp(p / .001) overflows.
    """
    start_ET = jnp.where(valid_T, benefit_ET, -1e9)
    # Fewer real tokens than places: an expert's row sums to what there is.
    there = valid_T.sum() * most / start_ET.shape[0]
    log_rows = jnp.log(jnp.clip(there, 1e-9, capacity))

    def project(_: jax.Array, factors: Any) -> Any:
        row_E, column_T, clip_ET = factors
        row_E = log_rows - jax.nn.logsumexp(start_ET - column_T[None] - clip_ET, axis=1)
        raised_ET = start_ET + row_E[:, None]
        sum_T = jax.nn.logsumexp(raised_ET - clip_ET, axis=0)
        column_T = jnp.maximum(sum_T - jnp.log(float(most)), 0.0)
        return row_E, column_T, jnp.maximum(raised_ET - column_T[None], 0.0)

    num_experts, num_tokens = start_ET.shape
    factors = jnp.zeros(num_experts), jnp.zeros(num_tokens), jnp.zeros_like(start_ET)
    row_E, column_T, _ = jax.lax.fori_loop(0, iterations, project, factors)
    return jnp.where(valid_T, start_ET + row_E[:, None] - column_T[None], -jnp.inf)


def _capacity(router: str, r: RouterInput, k: int) -> int:
    """C = ceil(k T / E). Raises ValueError where that is below 1, or k above E."""
    num_tokens, num_experts = r.logits_TE.shape
    if k * num_tokens < num_experts:
        raise ValueError(
            f"{router}: capacity k x tokens / experts = {k} x {num_tokens} / {num_experts} < 1; "
            f"each group needs at least {math.ceil(num_experts / k)} tokens"
        )
    if k > num_experts:
        raise ValueError(f"{router}: k={k} is more than the {num_experts} experts; lower k")
    return math.ceil(k * num_tokens / num_experts)


def _take(real_EC: jax.Array, token_EC: jax.Array, probs_TE: jax.Array) -> Routing:
    """Expert e takes the tokens token_EC[e], weighed by their probability, where real_EC."""
    num_experts = probs_TE.shape[1]
    expert_EC = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32)[:, None], token_EC.shape)
    expert_N = jnp.where(real_EC, expert_EC, num_experts).reshape(-1)
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
    "expert_choice_capped": RouterSpec(
        expert_choice_capped,
        "expert",
        "softmax, raw",
        "exact by design",
        "Zhou et al. 2022, 2202.09368",
        "SciPy's linear program",
    ),
}
