"""DeepSeek's routers: many fine experts, some of them shared, in groups that live on one device.

Shared experts work on every token, ungated: `moe.shared`. Experts are grouped as neighbours: group
g has the experts [g E/G, (g+1) E/G). A limit of M groups per token bounds how many devices it
visits.
"""

import jax
import jax.numpy as jnp

from moejax.routing.loss_free import first_bias, updated_bias
from moejax.routing.metrics import MoeStats
from moejax.routing.spec import LayerSize, RouterSpec
from moejax.routing.types import RouterInput, Routing, token_choice


def deepseek_moe(
    r: RouterInput, *, k: int = 2, expert_groups: int = 1, order: str = "token_major"
) -> Routing:
    """DeepSeekMoE (Dai et al. 2024, 2401.06066): softmax over the routed experts, the K best, raw.

    expert_groups = devices, for the loss `device` alone: no limit on what a token may choose.

    Raises:
      ValueError: see `check_groups`.
    """
    return deepseek_v2(
        r, k=k, expert_groups=expert_groups, top_groups=expert_groups, route_scale=1.0, order=order
    )


def deepseek_v2(
    r: RouterInput,
    *,
    k: int = 2,
    expert_groups: int = 1,
    top_groups: int = 1,
    route_scale: float = 1.0,
    order: str = "token_major",
) -> Routing:
    """DeepSeek-V2 (2405.04434, section 2.2): the K best within the M best groups, raw x a scale.

    A group is as good as its best expert. The losses are `load_balance` (.003 in the paper),
    `device` (.05) and `communication` (.02); G = 8, M = 3; the released 236B model scales by 16.

    Args:
      r: the router's input.
      k: experts per token.
      expert_groups: G, a divisor of E.
      top_groups: M.
      route_scale: the weights are multiplied by it.
      order: see `token_choice`.

    Raises:
      ValueError: see `check_groups`.
    """
    check_groups("deepseek_v2", r.logits_TE.shape[-1], k, expert_groups, top_groups)
    probs_TE = jax.nn.softmax(r.logits_TE)
    fixed_TE = jax.lax.stop_gradient(probs_TE)
    best_TG = by_group(fixed_TE, expert_groups).max(-1)
    _, expert_TK = jax.lax.top_k(within_groups(fixed_TE, best_TG, top_groups), k)
    weight_TK = route_scale * jnp.take_along_axis(probs_TE, expert_TK, axis=-1)
    routing = token_choice(r, expert_TK, weight_TK, probs_TE, order)
    return routing._replace(sums=group_sums(r, expert_TK, expert_groups, top_groups))


def deepseek_v3(
    r: RouterInput,
    *,
    k: int = 2,
    expert_groups: int = 1,
    top_groups: int = 1,
    route_scale: float = 2.5,
    order: str = "token_major",
) -> Routing:
    """DeepSeek-V3 (2412.19437, section 2.1.2): sigmoid scores, chosen with a bias, renormalised.

    A group's score is the sum of its K/M best biased scores; the K best biased scores within the M
    best groups are chosen; weight = s / (sum of the chosen s) x route_scale, of unbiased s. The
    bias is the state, moved by the sign of the load's error; beside it 1e-4 of
    `load_balance_sequence`. K = 8, G = 8, M = 4; the scale 2.5 stands in the released code.

    Args: as `deepseek_v2`.

    Raises:
      ValueError: see `check_groups`; k = 1, whose weight is constant.
    """
    num_experts = r.logits_TE.shape[-1]
    check_groups("deepseek_v3", num_experts, k, expert_groups, top_groups)
    if k == 1:
        raise ValueError("deepseek_v3 with k=1: one weight, renormalised, has no gradient")
    scores_TE = jax.nn.sigmoid(r.logits_TE)
    bias_E = jnp.zeros(num_experts) if r.state is None else r.state
    biased_TE = jax.lax.stop_gradient(scores_TE + bias_E[None])
    best = min(max(1, k // top_groups), num_experts // expert_groups)
    group_TG = jax.lax.top_k(by_group(biased_TE, expert_groups), best)[0].sum(-1)
    _, expert_TK = jax.lax.top_k(within_groups(biased_TE, group_TG, top_groups), k)
    weight_TK = jnp.take_along_axis(scores_TE, expert_TK, axis=-1)
    weight_TK = route_scale * weight_TK / (weight_TK.sum(-1, keepdims=True) + 1e-20)
    routing = token_choice(r, expert_TK, weight_TK, scores_TE, order)
    return routing._replace(sums=group_sums(r, expert_TK, expert_groups, top_groups))


def check_groups(router: str, experts: int, k: int, groups: int, top: int) -> None:
    """Raises ValueError where G does not divide E, M is not of 1 to G, or M groups hold less than K
    experts."""
    if groups < 1 or experts % groups:
        raise ValueError(f"{router}: {experts} experts are not divisible by expert_groups={groups}")
    if not 1 <= top <= groups:
        raise ValueError(f"{router}: top_groups={top} must be from 1 to expert_groups={groups}")
    if k > top * experts // groups:
        raise ValueError(
            f"{router}: k={k} experts do not fit into top_groups={top} groups of "
            f"{experts // groups}; raise top_groups or lower k"
        )


def by_group(a_TE: jax.Array, groups: int) -> jax.Array:
    """[T, E] to [T, G, E/G]."""
    return a_TE.reshape(*a_TE.shape[:-1], groups, -1)


def within_groups(choose_TE: jax.Array, group_TG: jax.Array, top: int) -> jax.Array:
    """choose_TE where the expert's group is among the `top` best, elsewhere -inf.

    Not 0: a biased score may be below it.
    """
    _, best_TM = jax.lax.top_k(group_TG, top)
    groups = group_TG.shape[-1]
    open_TG = jax.nn.one_hot(best_TM, groups).sum(-2) > 0
    open_TE = jnp.repeat(open_TG, choose_TE.shape[-1] // groups, axis=-1)
    return jnp.where(open_TE, choose_TE, -jnp.inf)


def group_sums(r: RouterInput, expert_TK: jax.Array, groups: int, top: int) -> dict[str, jax.Array]:
    """sent_G, float32: tokens sent to each group, once each, divided by the M groups they may go
    to: G sent_G / T' is the paper's f''."""
    num_experts = r.logits_TE.shape[-1]
    group_TK = expert_TK // (num_experts // groups)
    sent_TG = jax.nn.one_hot(group_TK, groups).max(1) * r.valid_T[:, None]
    return {"sent_G": sent_TG.sum(0) / top}


def update_bias(bias_LE: jax.Array, stats: MoeStats, *, bias_rate: float = 1e-3) -> jax.Array:
    """The bias one optimizer step later, by the sign of the load's error; V3's rate is 1e-3, and 0
    for the last 500 billion of its 14.8 trillion tokens."""
    return updated_bias(bias_LE, stats.load_E, bias_rate=bias_rate)


def zero_bias(size: LayerSize) -> jax.Array:
    """The bias at step 0."""
    return first_bias(size)


ROUTERS = {
    "deepseek_moe": RouterSpec(
        deepseek_moe,
        "token",
        "softmax, raw",
        "load_balance, device losses",
        "Dai et al. 2024, 2401.06066",
        "topk, and both losses by hand",
    ),
    "deepseek_v2": RouterSpec(
        deepseek_v2,
        "token",
        "softmax, raw, scaled",
        "load_balance, device, communication losses",
        "DeepSeek-AI 2024, 2405.04434",
        "topk without a limit, groups and losses by hand",
    ),
    "deepseek_v3": RouterSpec(
        deepseek_v3,
        "token",
        "sigmoid, renormalised, scaled",
        "bias from the loads (state), load_balance_sequence loss",
        "DeepSeek-AI 2024, 2412.19437",
        "groups and biases by hand, loss_free without a limit",
        init=zero_bias,
        update=update_bias,
    ),
}
