"""Dispatch by sorting: rows in expert order, one grouped matmul, no buffer and no padding.

What MegaBlocks (Gale et al. 2022, 2211.15841) calls dropless. A plan with a capacity is honoured
like in the other two: what it dropped is simply not sent.
"""

import jax
import jax.numpy as jnp

from moejax.dispatch.experts import Experts, experts_on_tokens
from moejax.dispatch.parallel import spread_grouped, whole
from moejax.dispatch.plan import Plan
from moejax.dispatch.rows import Rows
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
        x_ND = x_TD[token_N]
        y_ND, beside_TD = spread_grouped(p, x_ND, plan.load_E, activation, beside, plan.room)
        y_ND = y_ND.astype(jnp.float32) * weight_N[:, None]
        y_TD, output_ED = Rows(x_TD, token_N).results(y_ND, plan.load_E)
    else:
        mine, beside_TD = whole(p) if spread else p, beside.alone()
        y_TD, output_ED = experts_on_tokens(mine, x_TD, token_N, weight_N, plan.load_E, activation)
    if beside_TD is not None:
        y_TD += beside_TD
    return y_TD.astype(x_TD.dtype), output_ED
