"""Dispatch by gather: each expert has a buffer of C rows, filled by index."""

import jax
import jax.numpy as jnp

from moejax.dispatch.experts import Experts, experts_batched
from moejax.dispatch.parallel import spread_batched
from moejax.dispatch.plan import Plan
from moejax.dispatch.shared import NOTHING, Beside, first


def gather(
    p: Experts,
    x_TD: jax.Array,
    plan: Plan,
    activation: str,
    spread: bool = False,
    beside: Beside = NOTHING,
) -> tuple[jax.Array, jax.Array]:
    """Same contract and result as `einsum`, in O(E C D) instead of O(T E C D)."""
    num_tokens = x_TD.shape[0]
    num_experts = plan.load_E.shape[0]
    where = (plan.expert_N, plan.slot_N)
    # Free slots point past the last token: they read zeros, and what they give is dropped.
    token_EC = jnp.full((num_experts, plan.slots), num_tokens, jnp.int32)
    token_EC = token_EC.at[where].set(plan.token_N, mode="drop")
    weight_EC = jnp.zeros((num_experts, plan.slots), plan.weight_N.dtype)
    weight_EC = weight_EC.at[where].set(plan.weight_N, mode="drop")
    x_ECD = x_TD.at[token_EC].get(mode="fill", fill_value=0)
    if spread:
        y_ECD, beside_TD = spread_batched(p, x_ECD, activation, beside)
    else:
        used_E = jnp.zeros(num_experts, jnp.int32).at[plan.expert_N]
        y_ECD = experts_batched(p, x_ECD, activation, used_E.max(plan.slot_N + 1, mode="drop"))
        beside_TD = beside.alone()
    y_ECD = y_ECD.astype(jnp.float32) * weight_EC[..., None]
    y_TD = first(x_TD, beside_TD).at[token_EC].add(y_ECD, mode="drop")
    return y_TD.astype(x_TD.dtype), y_ECD.sum(1)
