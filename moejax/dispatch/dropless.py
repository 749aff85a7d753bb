"""Dispatch by sorting: rows in expert order, one grouped matmul, no buffer and no padding.

What MegaBlocks (Gale et al. 2022, 2211.15841) calls dropless. A plan with a capacity is honoured
like in the other two: what it dropped is simply not sent.
"""

import jax
import jax.numpy as jnp

from moejax.dispatch.experts import Experts, experts_grouped
from moejax.dispatch.parallel import spread_grouped
from moejax.dispatch.plan import Plan
from moejax.dispatch.shared import NOTHING, Beside, first


def dropless(
    p: Experts,
    x_TD: jax.Array,
    plan: Plan,
    activation: str,
    spread: bool = False,
    beside: Beside = NOTHING,
) -> tuple[jax.Array, jax.Array]:
    """Same contract and result as `einsum`, in O(N D)."""
    token_N = plan.token_N[plan.order_N]
    weight_N = plan.weight_N[plan.order_N]
    if spread:
        y_ND, beside_TD = spread_grouped(p, x_TD[token_N], plan.load_E, activation, beside)
    else:
        y_ND = experts_grouped(p, x_TD[token_N], plan.load_E, activation)
        beside_TD = beside.alone()
    y_ND = y_ND.astype(jnp.float32) * weight_N[:, None]
    y_TD = first(x_TD, beside_TD).at[token_N].add(y_ND)
    output_ED = jnp.zeros((plan.load_E.shape[0], x_TD.shape[1]), jnp.float32)
    output_ED = output_ED.at[plan.expert_N[plan.order_N]].add(y_ND, mode="drop")
    return y_TD.astype(x_TD.dtype), output_ED
