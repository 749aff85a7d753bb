"""Dispatch by sorting: rows in expert order, one grouped matmul, no buffer and no padding.

What MegaBlocks (Gale et al. 2022, 2211.15841) calls dropless. A plan with a capacity is honoured
like in the other two: what it dropped is simply not sent.
"""

import jax
import jax.numpy as jnp

from moejax.dispatch.experts import Experts, experts_on_tokens
from moejax.dispatch.parallel import in_lines, spread_grouped, whole
from moejax.dispatch.plan import Plan
from moejax.dispatch.rows import added_up
from moejax.dispatch.shared import NOTHING, Beside


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
    if spread and jax.lax.axis_size("expert") > 1:
        x_NX, num_experts = in_lines(x_TD)[token_N], plan.load_E.shape[0]
        y_NX, beside_TD = spread_grouped(p, x_NX, plan.load_E, activation, beside, plan.room)
        y_NX = y_NX.astype(jnp.float32) * weight_N.reshape(-1, *(1,) * (x_NX.ndim - 1))
        y_TD = added_up(y_NX, token_N, len(x_TD)).reshape(x_TD.shape)
        output_EX = added_up(y_NX, plan.expert_N[plan.order_N], num_experts)
        output_ED = output_EX.reshape(num_experts, -1)
    else:
        mine, beside_TD = whole(p) if spread else p, beside.alone()
        y_TD, output_ED = experts_on_tokens(mine, x_TD, token_N, weight_N, plan.load_E, activation)
    if beside_TD is not None:
        y_TD += beside_TD
    return y_TD.astype(x_TD.dtype), output_ED
