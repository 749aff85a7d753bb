"""The dense oracle: every expert on every token, then a weighted sum. For tests and notebooks
only."""

import jax
import jax.numpy as jnp

from moejax.dispatch import ACTIVATIONS, Experts, Plan


def dense_moe(p: Experts, x_TD: jax.Array, weight_TE: jax.Array, activation: str) -> jax.Array:
    """y_t = sum_e weight_te FFN_e(x_t), in float32, with the weights zero where an expert is not
    used."""
    function, gated = ACTIVATIONS[activation]
    x_TD, p = x_TD.astype(jnp.float32), jax.tree.map(lambda w: w.astype(jnp.float32), p)
    h_TEF = jnp.einsum("td,edf->tef", x_TD, p.w_in_EDF)
    if gated:
        assert p.w_gate_EDF is not None
        h_TEF = function(jnp.einsum("td,edf->tef", x_TD, p.w_gate_EDF)) * h_TEF
    else:
        h_TEF = function(h_TEF)
    return jnp.einsum("tef,efd,te->td", h_TEF, p.w_out_EFD, weight_TE)


def plan_TE(plan: Plan, num_tokens: int, num_experts: int) -> jax.Array:
    """The plan as the dense float32 [T, E] matrix of the weights that survived capacity."""
    zeros_TE = jnp.zeros((num_tokens, num_experts), plan.weight_N.dtype)
    return zeros_TE.at[plan.token_N, plan.expert_N].add(plan.weight_N, mode="drop")
