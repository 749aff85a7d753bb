"""Routers in which every token chooses its experts. Each is one screen; the paper stands above
it."""

import jax
import jax.numpy as jnp

from moejax.routing.spec import RouterSpec
from moejax.routing.types import RouterInput, Routing, token_choice, token_noise


def switch(r: RouterInput, *, k: int = 1) -> Routing:
    """Switch: the best expert, weighed by its raw probability (Fedus et al. 2021, 2101.03961, eq.
    2).

    The weight stays raw: renormalised over one choice it would be the constant 1, and the router
    would get no gradient. The paper's input jitter acts before the router's matmul (`moe.jitter`).

    Raises:
      ValueError: k other than 1.
    """
    if k != 1:
        raise ValueError(f"switch routes each token to 1 expert, got k={k}; use topk for k > 1")
    return topk(r, k=1)


def topk(
    r: RouterInput, *, k: int = 2, renormalise: bool = False, order: str = "k_major"
) -> Routing:
    """Softmax over all experts, then the K best.

    raw (OLMoE, Muennighoff et al. 2024, 2409.02060), or renormalised to sum to 1, which equals a
    softmax over the K chosen logits (Mixtral, Jiang et al. 2024, 2401.04088).

    Raises:
      ValueError: k = 1 renormalised, whose router gradient is zero.
    """
    if k == 1 and renormalise:
        raise ValueError(
            "topk with k=1 cannot be renormalised: weight 1 gives the router no gradient"
        )
    probs_TE = jax.nn.softmax(r.logits_TE)
    weight_TK, expert_TK = jax.lax.top_k(probs_TE, k)
    if renormalise:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdims=True)
    return token_choice(r, expert_TK, weight_TK, probs_TE, order)


def gshard_top2(r: RouterInput, *, k: int = 2, second: str = "random") -> Routing:
    """GShard: the best expert, and the second with a probability that grows with its weight.

    Lepikhin et al. 2020, 2006.16668, algorithm 1. Weights sum to 1, taken before anything drops;
    all first choices come before any second choice. In training a second choice of weight w2 is
    kept with probability min(1, 2 w2); one refused by the coin takes no slot. Evaluation keeps them
    all.

    Args:
      r: the router's input; `key` None keeps every second choice.
      k: 2; any other value is refused.
      second: 'random' as in the paper, or 'always'.

    Raises:
      ValueError: k other than 2, or unknown `second`.
    """
    if k != 2:
        raise ValueError(f"gshard_top2 routes each token to 2 experts, got k={k}; use topk")
    if second not in ("random", "always"):
        raise ValueError(f"unknown second={second!r}: use 'random' or 'always'")
    probs_TE = jax.nn.softmax(r.logits_TE)
    weight_TK, expert_TK = jax.lax.top_k(probs_TE, 2)
    weight_TK = weight_TK / weight_TK.sum(-1, keepdims=True)
    if second == "random" and r.key is not None:
        coin_T = token_noise(r, jax.random.uniform)
        refused_T = coin_T >= 2.0 * weight_TK[:, 1]
        expert_TK = expert_TK.at[:, 1].set(
            jnp.where(refused_T, probs_TE.shape[-1], expert_TK[:, 1])
        )
    return token_choice(r, expert_TK, weight_TK, probs_TE)


def top_p(r: RouterInput, *, k: int = 4, p: float = 0.4, order: str = "token_major") -> Routing:
    """Every token its own number of experts: best first, until their probabilities reach p.

    Huang et al. 2024, 2403.07652; weights raw. At most k experts, and the first one always.
    With a flat router all tokens take many: the paper adds 1e-4 of `router_entropy`.

    Raises:
      ValueError: p outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p: p={p} must be in (0, 1]; the paper's is 0.4")
    probs_TE = jax.nn.softmax(r.logits_TE)
    weight_TK, expert_TK = jax.lax.top_k(probs_TE, k)
    before_TK = jnp.cumsum(weight_TK, axis=-1) - weight_TK
    open_TK = (before_TK < p).at[:, 0].set(True)
    expert_TK = jnp.where(open_TK, expert_TK, probs_TE.shape[-1])
    entropy_T = -(probs_TE * jax.nn.log_softmax(r.logits_TE)).sum(-1)
    routing = token_choice(r, expert_TK, weight_TK, probs_TE, order)
    return routing._replace(sums={"entropy": jnp.where(r.valid_T, entropy_T, 0.0).sum()})


ROUTERS = {
    "switch": RouterSpec(
        switch,
        "token",
        "softmax, raw",
        "load_balance loss",
        "Fedus et al. 2021, 2101.03961",
        "flaxformer and Hugging Face test values",
    ),
    "gshard_top2": RouterSpec(
        gshard_top2,
        "token",
        "softmax, renormalised",
        "load_balance_top1 loss",
        "Lepikhin et al. 2020, 2006.16668",
        "praxis and flaxformer test values",
    ),
    "topk": RouterSpec(
        topk,
        "token",
        "softmax, raw or renormalised",
        "load_balance, router_z losses",
        "Muennighoff et al. 2024, 2409.02060; Jiang et al. 2024, 2401.04088",
        "V-MoE, MaxText and SGLang test values",
    ),
    "top_p": RouterSpec(
        top_p,
        "token",
        "softmax, raw",
        "load_balance, router_entropy losses",
        "Huang et al. 2024, 2403.07652",
        "hand-computed cases",
    ),
}
