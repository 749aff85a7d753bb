"""Balance losses, each with its normalisation in its name and its docstring.

A loss is a function of one layer's `MoeStats`: sums over the whole global batch, all microbatches
and devices included. It is 1 at perfect balance (router_z: no such value); a training loss adds
weight x mean over MoE layers. Gradients flow through the probabilities, never through the counts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.routing.metrics import MoeStats


def load_balance(count_E: jax.Array, prob_E: jax.Array) -> jax.Array:
    """E sum_e f_e P_e, f = counts and P = probabilities, each divided by its own sum; 1 at balance.

    Fedus et al. 2021, 2101.03961, eq. 4 (K = 1). For K > 1 f_e = n_e / (K T): other frameworks that
    divide by T alone have the value K at balance.
    """
    count_E = jax.lax.stop_gradient(count_E.astype(jnp.float32))
    share_E = count_E / jnp.maximum(count_E.sum(), 1.0)
    return count_E.shape[-1] * jnp.dot(share_E, prob_E)


def all_choices(stats: MoeStats) -> jax.Array:
    """`load_balance` over all K choices, before dropping (OLMoE, Mixtral-style)."""
    return load_balance(stats.load_E, stats.prob_E / jnp.maximum(stats.tokens, 1))


def first_choices(stats: MoeStats) -> jax.Array:
    """`load_balance` over first choices only, before dropping (GShard)."""
    return load_balance(stats.first_E, stats.prob_E / jnp.maximum(stats.tokens, 1))


def router_z(stats: MoeStats) -> jax.Array:
    """Mean over valid tokens of logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022, 2202.08906, eq. 5).

    (ln E)^2 where all logits are 0.
    """
    return stats.z / jnp.maximum(stats.tokens, 1)


def active_l1(stats: MoeStats) -> jax.Array:
    """sum_e (E n_e / T') (l1_e / T'): ReMoE's L1 norm, heavier for busy experts (Wang et al. 2024,
    2412.14711).

    With l1_e = lambda / K sum_t relu(logits): lambda times the mean over tokens of sum_e f_e relu,
    f_e = E n_e / (K T'). The strength lambda is inside, so the loss has weight 1 in training.

    Raises:
      ValueError: a router without the sum l1_E.
    """
    tokens = jnp.maximum(stats.tokens, 1).astype(jnp.float32)
    count_E = jax.lax.stop_gradient(stats.load_E.astype(jnp.float32))
    l1_E = own_sum(stats, "l1_E", "active_l1", "remoe")
    return count_E.shape[-1] * jnp.dot(count_E / tokens, l1_E / tokens)


def selector_entropy(stats: MoeStats) -> jax.Array:
    """Mean over tokens of the sum over selectors of H(shares), in nats (DSelect-k, Hazimeh et al.
    2021, 2106.03760); k ln E where all experts share alike, 0 once each has one expert."""
    total = own_sum(stats, "selector_entropy", "selector_entropy", "dselect_k")
    return total / jnp.maximum(stats.tokens, 1)


def selector_reach(stats: MoeStats) -> jax.Array:
    """Mean over tokens and selectors of 1 / (share of the codes that name an expert); 1 where E is
    a power of 2 (DSelect-k, Hazimeh et al. 2021, 2106.03760, sum over selectors there)."""
    total = own_sum(stats, "selector_reach", "selector_reach", "dselect_k")
    return total / jnp.maximum(stats.tokens, 1)


def own_sum(stats: MoeStats, name: str, loss: str, router: str) -> jax.Array:
    """A sum that only some routers provide.

    Raises:
      ValueError: this router does not.
    """
    if name not in stats.own:
        have = ", ".join(stats.own) or "none"
        raise ValueError(
            f"balance.{loss} needs the sum {name!r} of router {router}; this router's sums: {have}"
        )
    return stats.own[name]


BALANCE_LOSSES: dict[str, Callable[[MoeStats], jax.Array]] = {
    "load_balance": all_choices,
    "load_balance_top1": first_choices,
    "router_z": router_z,
    "active_l1": active_l1,
    "selector_entropy": selector_entropy,
    "selector_reach": selector_reach,
}


def balance_losses(stats: MoeStats, weights: dict[str, float]) -> dict[str, jax.Array]:
    """Each loss of non-zero weight, unweighted, as its mean over the leading layer axis of
    `stats`."""
    return {
        name: jax.vmap(BALANCE_LOSSES[name])(stats).mean()
        for name, weight in weights.items()
        if weight
    }
