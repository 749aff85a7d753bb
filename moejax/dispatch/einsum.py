"""Dispatch by one-hot einsum: the 2020 reference (GShard, 2006.16668). Clear, and slow: T x E x
C."""

import jax
import jax.numpy as jnp

from moejax.dispatch.experts import Experts, experts_batched
from moejax.dispatch.parallel import spread_batched
from moejax.dispatch.plan import Plan
from moejax.dispatch.shared import NOTHING, Beside, first


def einsum(
    p: Experts,
    x_TD: jax.Array,
    plan: Plan,
    activation: str,
    spread: bool = False,
    beside: Beside = NOTHING,
) -> tuple[jax.Array, jax.Array]:
    """Tokens to expert buffers and back by matmuls with a one-hot [T, E, C] tensor.

    Args:
      p: the experts' weights.
      x_TD: tokens, in the compute dtype.
      plan: who goes where; C = plan.slots.
      activation: a key of ACTIVATIONS.
      spread: the experts lie on several devices, and this one is inside `shard_map`.
      beside: work on the same tokens while rows travel; what it gives is added to y_TD.

    Returns:
      y_TD in x's dtype; zeros for a token that no expert worked on. And output_ED, float32, each
        expert's weighted outputs added up, which costs nothing where nobody reads it.
    """
    shape = (x_TD.shape[0], plan.load_E.shape[0], plan.slots)
    where = (plan.token_N, plan.expert_N, plan.slot_N)
    dispatch_TEC = jnp.zeros(shape, x_TD.dtype).at[where].set(1, mode="drop")
    combine_TEC = jnp.zeros(shape, plan.weight_N.dtype).at[where].set(plan.weight_N, mode="drop")
    x_ECD = jnp.einsum("tec,td->ecd", dispatch_TEC, x_TD)
    if spread:
        y_ECD, beside_TD = spread_batched(p, x_ECD, activation, beside)
    else:
        y_ECD, beside_TD = experts_batched(p, x_ECD, activation), beside.alone()
    y_TD = first(x_TD, beside_TD)
    y_TD += jnp.einsum("tec,ecd->td", combine_TEC, y_ECD, preferred_element_type=jnp.float32)
    output_ED = jnp.einsum("ec,ecd->ed", combine_TEC.sum(0), y_ECD.astype(jnp.float32))
    return y_TD.astype(x_TD.dtype), output_ED
