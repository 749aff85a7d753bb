"""Balance losses, each with its normalisation in its name and its docstring.

A loss is a function of one layer's `MoeStats`: sums over the whole global batch, all microbatches
and devices included. It is 1 at perfect balance (importance, load: 0; router_z, router_entropy: no
such value); a training loss adds weight x mean over MoE layers. Gradients flow through the
probabilities, never through the counts. Some need sums of their own (`Routing.sums`), which not
every router keeps.
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


def own_sum(stats: MoeStats, name: str, loss: str) -> jax.Array:
    """A sum that only some routers provide.

    Raises:
      ValueError: this router does not.
    """
    if name not in stats.own:
        has = ", ".join(sorted(stats.own)) or "none"
        raise ValueError(
            f"balance.{loss} needs the router's own sum {name!r}; this router's sums: {has}; "
            "`moejax routers` shows which router goes with it"
        )
    return stats.own[name]


def squared_cv(amount_E: jax.Array, unbiased: bool = False) -> jax.Array:
    """Squared coefficient of variation over the last axis, variance / (mean^2 + 1e-10); 0 at
    balance.

    Shazeer et al. 2017, 1701.06538, section 4. The population's variance; `unbiased` divides by
    E - 1.
    """
    mean = amount_E.mean(-1)
    return amount_E.var(-1, ddof=int(unbiased)) / (jnp.square(mean) + 1e-10)


def importance(stats: MoeStats) -> jax.Array:
    """`squared_cv` of the summed gate weights (Shazeer et al. 2017, 1701.06538, eq. 7); 0 at
    balance.

    V-MoE (Riquelme et al. 2021, 2106.05974) sums noiseless probabilities of all experts instead,
    and weighs this and `load` by half its coefficient each.
    """
    return squared_cv(own_sum(stats, "importance_E", "importance"))


def load(stats: MoeStats) -> jax.Array:
    """`squared_cv` of the expected number of tokens, were their noise drawn again (Shazeer et al.
    2017, eq. 8-11); 0 at balance.

    With expert groups (their appendix B) an expert's load is its group's
    load times its own among the `sent_G` tokens of its group, divided by how many these are.
    """
    load_E = own_sum(stats, "load_E", "load")
    if "load_G" in stats.own:
        share_G = stats.own["load_G"] / jnp.maximum(stats.own["sent_G"], 1.0)
        load_E = load_E * jnp.repeat(share_G, load_E.shape[0] // share_G.shape[0])
    return squared_cv(load_E)


def load_balance_sequence(stats: MoeStats) -> jax.Array:
    """`load_balance` of each sequence on its own, then the mean over sequences (DeepSeek-V3,
    2412.19437, eq. 17-20); counts come from the unbiased scores."""
    return stats.sequence_balance / jnp.maximum(stats.sequences, 1)


def device(stats: MoeStats) -> jax.Array:
    """`load_balance` over groups of experts: G sum_g f_g P_g, f and P added up in each group.

    DeepSeekMoE (Dai et al. 2024, 2401.06066), whose mean of E f_e over a group is G f_g.
    """
    groups = own_sum(stats, "sent_G", "device").shape[0]
    load_G, prob_G = (a.reshape(groups, -1).sum(1) for a in (stats.load_E, stats.prob_E))
    return load_balance(load_G, prob_G / jnp.maximum(stats.tokens, 1))


def communication(stats: MoeStats) -> jax.Array:
    """G sum_g f''_g P_g, f'' = tokens sent to the group, once each, over M T (DeepSeek-V2,
    2405.04434); 1 at balance where every token goes to M groups."""
    sent_G = jax.lax.stop_gradient(own_sum(stats, "sent_G", "communication"))
    prob_G = stats.prob_E.reshape(sent_G.shape[0], -1).sum(1)
    tokens = jnp.maximum(stats.tokens, 1)
    return sent_G.shape[0] * jnp.dot(sent_G / tokens, prob_G / tokens)


def router_entropy(stats: MoeStats) -> jax.Array:
    """Mean over valid tokens of the router's entropy in nats; small = few experts reach p
    (`top_p`, Huang et al. 2024, 2403.07652)."""
    return own_sum(stats, "entropy", "router_entropy") / jnp.maximum(stats.tokens, 1)


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
    l1_E = own_sum(stats, "l1_E", "active_l1")
    return count_E.shape[-1] * jnp.dot(count_E / tokens, l1_E / tokens)


def selector_entropy(stats: MoeStats) -> jax.Array:
    """Mean over tokens of the sum over selectors of H(shares), in nats (DSelect-k, Hazimeh et al.
    2021, 2106.03760); k ln E where all experts share alike, 0 once each has one expert."""
    total = own_sum(stats, "selector_entropy", "selector_entropy")
    return total / jnp.maximum(stats.tokens, 1)


def selector_reach(stats: MoeStats) -> jax.Array:
    """Mean over tokens and selectors of 1 / (share of the codes that name an expert); 1 where E is
    a power of 2 (DSelect-k, Hazimeh et al. 2021, 2106.03760, sum over selectors there)."""
    total = own_sum(stats, "selector_reach", "selector_reach")
    return total / jnp.maximum(stats.tokens, 1)


BALANCE_LOSSES: dict[str, Callable[[MoeStats], jax.Array]] = {
    "load_balance": all_choices,
    "load_balance_top1": first_choices,
    "router_z": router_z,
    "importance": importance,
    "load": load,
    "router_entropy": router_entropy,
    "load_balance_sequence": load_balance_sequence,
    "device": device,
    "communication": communication,
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
