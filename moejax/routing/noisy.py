"""Noisy top-k: noise explores, and makes the load differentiable. Flat, hierarchical, and V-MoE's.

An expert's *load* is the expected number of tokens that choose it. Counts have no gradient; but
with Gaussian noise on the logits, the probability that a token would choose the expert again, were
the noise drawn anew, has one. The losses `importance` and `load` are made from the sums kept here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from moejax.routing.spec import RouterSpec
from moejax.routing.types import RouterInput, Routing, combine_TE, token_choice, token_noise


class Gates(NamedTuple):
    """Noisy top-K gates over the last axis, of E entries; any axes may stand before it.

    Attributes:
      expert_TK: int32, best first.
      weight_TK: softmax over the K chosen noisy logits.
      chosen_TE: float32, 1 where chosen.
      load_TE: float32, the probability of being chosen, in training; `chosen_TE` in evaluation.
    """

    expert_TK: jax.Array
    weight_TK: jax.Array
    chosen_TE: jax.Array
    load_TE: jax.Array


def noisy_gates(
    logits_TE: jax.Array, raw_std_TE: jax.Array, unit_TE: jax.Array | None, k: int
) -> Gates:
    """Shazeer et al. 2017, eq. 3-5: h = logits + unit softplus(raw_std), unit ~ N(0, 1) or None for
    no noise; the K best of h."""
    std_TE = jnp.maximum(jax.nn.softplus(raw_std_TE), 1e-6)
    noisy_TE = logits_TE if unit_TE is None else logits_TE + unit_TE * std_TE
    best_TK, expert_TK = jax.lax.top_k(noisy_TE, k)
    chosen_TE = jax.nn.one_hot(expert_TK, logits_TE.shape[-1]).sum(-2)
    load_TE = chosen_TE if unit_TE is None else chance_of_choice(logits_TE, noisy_TE, std_TE, k)
    return Gates(expert_TK, jax.nn.softmax(best_TK), chosen_TE, load_TE)


def chance_of_choice(
    logits_TE: jax.Array, noisy_TE: jax.Array, std_TE: jax.Array, k: int
) -> jax.Array:
    """The probability that an expert is among the K best if its own noise alone is drawn again.

    Shazeer et al. 2017, eq. 8-9: Phi((logits - threshold) / std), the threshold being the K-th
    largest of the *other* experts' noisy logits; 1 where K is all of them.
    """
    if k == logits_TE.shape[-1]:
        return jnp.ones_like(logits_TE)
    best_TK, expert_TK = jax.lax.top_k(noisy_TE, k + 1)
    chosen_TE = jax.nn.one_hot(expert_TK[..., :k], logits_TE.shape[-1]).sum(-2)
    # Without a chosen expert, the K-th largest is the one that was K+1-st.
    threshold_TE = jnp.where(chosen_TE > 0, best_TK[..., k, None], best_TK[..., k - 1, None])
    return ndtr((logits_TE - threshold_TE) / std_TE)


def unit_noise(r: RouterInput, width: int) -> jax.Array | None:
    """N(0, 1) of each token, [T, width], in training; None in evaluation."""
    if r.key is None:
        return None
    return token_noise(r, lambda key: jax.random.normal(key, (width,)))


def noisy_topk(r: RouterInput, *, k: int = 2, order: str = "k_major") -> Routing:
    """Noisy top-k gating (Shazeer et al. 2017, 1701.06538): learned noise, then the K best.

    The weights are a softmax over the K noisy logits that were kept. A second projection of the
    token gives the noise's scale; both projections start at 0, noise included: its scale is ln 2.
    The paper trains K = 4 with 0.1 of `importance` and of `load` (language modelling). Evaluation
    has no noise, and its load is a count.

    Raises:
      ValueError: k = 1, whose weight is the constant 1.
    """
    if k == 1:
        raise ValueError("noisy_topk with k=1: weight 1 gives the router no gradient; use k > 1")
    num_experts = r.logits_TE.shape[-1]
    gates = noisy_gates(r.logits_TE, further(r, num_experts), unit_noise(r, num_experts), k)
    scores_TE = jax.nn.softmax(r.logits_TE)
    routing = token_choice(r, gates.expert_TK, gates.weight_TK, scores_TE, order)
    sums = {
        "importance_E": combine_TE(routing).sum(0),
        "load_E": jnp.where(r.valid_T[:, None], gates.load_TE, 0.0).sum(0),
    }
    return routing._replace(sums=sums)


def hierarchical(
    r: RouterInput,
    *,
    k: int = 4,
    expert_groups: int = 2,
    top_groups: int = 2,
    order: str = "k_major",
) -> Routing:
    """Two levels of noisy top-k: M of G groups of experts, then K / M experts of each of them.

    Shazeer et al. 2017, appendix B: weight = G_primary(x)_g G_g(x)_e. The logits are the second
    level's; the further projections are the primary logits [G], their noise [G], and the second
    level's noise [E]. Sums: importance_E; load_G, the primary load; sent_G, tokens that chose the
    group; load_E, the second level's load among those. `load` multiplies them on the whole batch.

    Args:
      r: the router's input.
      k: experts per token over all groups.
      expert_groups: G, a divisor of E.
      top_groups: M.
      order: see `token_choice`.

    Raises:
      ValueError: E is no multiple of G, k none of M; or a level with one choice, whose weight is
        the constant 1; or with more choices than it has.
    """
    num_experts = r.logits_TE.shape[-1]
    second, size = k // top_groups, num_experts // expert_groups
    if num_experts % expert_groups or k % top_groups:
        raise ValueError(
            f"hierarchical: experts / expert_groups = {num_experts} / {expert_groups} and "
            f"k / top_groups = {k} / {top_groups} must be whole numbers"
        )
    if not (2 <= top_groups <= expert_groups and 2 <= second <= size):
        raise ValueError(
            f"hierarchical: {top_groups} of {expert_groups} groups, {second} of their {size} "
            "experts; each level must choose 2 or more, and no more than it has"
        )
    extra_TX = further(r, 2 * expert_groups + num_experts)
    parts = jnp.split(extra_TX, [expert_groups, 2 * expert_groups], axis=-1)
    unit_TX = unit_noise(r, expert_groups + num_experts)

    def by_group(a_TE: jax.Array) -> jax.Array:
        return a_TE.reshape(-1, expert_groups, size)

    first_TG = None if unit_TX is None else unit_TX[:, :expert_groups]
    second_TGE = None if unit_TX is None else by_group(unit_TX[:, expert_groups:])
    primary = noisy_gates(parts[0], parts[1], first_TG, top_groups)
    secondary = noisy_gates(by_group(r.logits_TE), by_group(parts[2]), second_TGE, second)
    group_TM1 = primary.expert_TK[..., None]
    expert_TMK = jnp.take_along_axis(secondary.expert_TK, group_TM1, axis=1) + group_TM1 * size
    inner_TMK = jnp.take_along_axis(secondary.weight_TK, group_TM1, axis=1)
    weight_TK = (primary.weight_TK[..., None] * inner_TMK).reshape(-1, k)
    # Best first, whatever its group.
    sorted_TK = jnp.argsort(-weight_TK, axis=-1, stable=True)
    expert_TK = jnp.take_along_axis(expert_TMK.reshape(-1, k), sorted_TK, axis=1)
    weight_TK = jnp.take_along_axis(weight_TK, sorted_TK, axis=1)
    scores_TGE = jax.nn.softmax(by_group(r.logits_TE)) * jax.nn.softmax(parts[0])[..., None]
    routing = token_choice(r, expert_TK, weight_TK, scores_TGE.reshape(r.logits_TE.shape), order)

    def total(a_T: jax.Array) -> jax.Array:
        valid = r.valid_T.reshape(-1, *[1] * (a_T.ndim - 1))
        return jnp.where(valid, a_T, 0.0).sum(0)

    sums = {
        "importance_E": combine_TE(routing).sum(0),
        "load_G": total(primary.load_TE),
        "sent_G": total(primary.chosen_TE),
        "load_E": total(primary.chosen_TE[..., None] * secondary.load_TE).reshape(-1),
    }
    return routing._replace(sums=sums)


def vmoe(r: RouterInput, *, k: int = 2, order: str = "k_major") -> Routing:
    """V-MoE: the K best of softmax(logits + N(0, 1/E^2)), raw (Riquelme et al. 2021, 2106.05974).

    Both sums differ from Shazeer's. importance_E adds up *noiseless* probabilities, of all experts;
    load_E is `chance_above`. The paper's coefficient .01 is for the mean of the two losses: .005
    each. order 'bpr' is its batch-prioritised routing: tokens of large weight are served first; it
    is worth something where the capacity factor is below 1, and is not causal.
    """
    num_experts = r.logits_TE.shape[-1]
    probs_TE = jax.nn.softmax(r.logits_TE)
    unit_TE = unit_noise(r, num_experts)
    noisy_TE = r.logits_TE if unit_TE is None else r.logits_TE + unit_TE / num_experts
    weight_TK, expert_TK = jax.lax.top_k(jax.nn.softmax(noisy_TE), k)
    if unit_TE is None:
        load_TE = jax.nn.one_hot(expert_TK, num_experts).sum(1)
    else:
        load_TE = chance_above(r.logits_TE, noisy_TE, 1 / num_experts, k)
    routing = token_choice(r, expert_TK, weight_TK, probs_TE, order)
    sums = {
        "importance_E": jnp.where(r.valid_T[:, None], probs_TE, 0.0).sum(0),
        "load_E": jnp.where(r.valid_T[:, None], load_TE, 0.0).sum(0),
    }
    return routing._replace(sums=sums)


def chance_above(
    logits_TE: jax.Array, noisy_TE: jax.Array, std: float | jax.Array, k: int
) -> jax.Array:
    """1 - Phi((threshold - logits) / std), the threshold being the token's K-th largest noisy logit
    of *all* experts (Riquelme et al. 2021, appendix A.2)."""
    threshold_T1 = jax.lax.top_k(noisy_TE, k)[0][..., -1:]
    return ndtr((logits_TE - threshold_T1) / std)


def further(r: RouterInput, columns: int) -> jax.Array:
    """The router's further projections.

    Raises:
      ValueError: there are none, or not as many.
    """
    if r.extra_TX is None or r.extra_TX.shape[-1] != columns:
        has = 0 if r.extra_TX is None else r.extra_TX.shape[-1]
        raise ValueError(f"the router needs {columns} further projections in extra_TX, got {has}")
    return r.extra_TX


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Projections that start at 0: every expert is alike, and the noise has scale ln 2."""
    return jnp.zeros(shape)


def _columns(experts: int) -> int:
    return experts


def _hierarchical_columns(experts: int, *, expert_groups: int = 2) -> int:
    return 2 * expert_groups + experts


ROUTERS = {
    "noisy_topk": RouterSpec(
        noisy_topk,
        "token",
        "softmax over the chosen noisy logits",
        "importance, load losses",
        "Shazeer et al. 2017, 1701.06538",
        "load probabilities by hand and by drawing noise again",
        columns=_columns,
        weights=zeros,
    ),
    "hierarchical": RouterSpec(
        hierarchical,
        "token",
        "product of two noisy softmaxes",
        "importance, load losses",
        "Shazeer et al. 2017, 1701.06538, appendix B",
        "two levels written out by loops",
        columns=_hierarchical_columns,
        weights=zeros,
    ),
    "vmoe": RouterSpec(
        vmoe,
        "token",
        "softmax, raw",
        "importance, load losses",
        "Riquelme et al. 2021, 2106.05974",
        "V-MoE test values",
    ),
}
