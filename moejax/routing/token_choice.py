"""Routers in which every token chooses its experts. Each is one screen; the paper stands above
it."""

import jax
import jax.numpy as jnp

from moejax.routing.metrics import MoeStats
from moejax.routing.spec import LayerSize, RouterSpec
from moejax.routing.types import RouterInput, Routing, token_choice


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
        coin_T = jax.random.uniform(r.key, expert_TK.shape[:1])
        refused_T = coin_T >= 2.0 * weight_TK[:, 1]
        expert_TK = expert_TK.at[:, 1].set(
            jnp.where(refused_T, probs_TE.shape[-1], expert_TK[:, 1])
        )
    return token_choice(r, expert_TK, weight_TK, probs_TE)


def loss_free(
    r: RouterInput, *, k: int = 2, renormalise: bool = False, order: str = "token_major"
) -> Routing:
    """Auxiliary-loss-free balancing: a bias decides who is chosen, never how much it counts.

    Wang et al. 2024, 2408.15664: s = sigmoid(logits); choose TopK(s + b); weight = s, or s divided
    by the sum of the chosen s (DeepSeek-V3, 2412.19437). The bias is the router's state, moved once
    per optimizer step by `sign_update`, and has no gradient.
    """
    scores_TE = jax.nn.sigmoid(r.logits_TE)
    bias_E = jnp.zeros(scores_TE.shape[-1]) if r.state is None else r.state
    _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(scores_TE + bias_E[None]), k)
    weight_TK = jnp.take_along_axis(scores_TE, expert_TK, axis=-1)
    if renormalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdims=True) + 1e-20)
    return token_choice(r, expert_TK, weight_TK, scores_TE, order)


def sign_update(bias_E: jax.Array, load_E: jax.Array, *, bias_rate: float = 1e-3) -> jax.Array:
    """The bias one optimizer step later: up for experts below the mean load, down above it.

    Wang et al. 2024, algorithm 1: b += u sign(mean - n), n = assignments before dropping in the
    whole global batch. |b| is at most bias_rate x steps: short runs need a larger rate than the
    paper's 1e-3. The last axis is that of experts.
    """
    load_E = load_E.astype(jnp.float32)
    return bias_E + bias_rate * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)


def zero_bias(size: LayerSize) -> jax.Array:
    """The bias at step 0."""
    return jnp.zeros(size.experts, jnp.float32)


def update_bias(bias_LE: jax.Array, stats: MoeStats, *, bias_rate: float = 1e-3) -> jax.Array:
    """`sign_update` from the loads of the global batch."""
    return sign_update(bias_LE, stats.load_E, bias_rate=bias_rate)


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
    "loss_free": RouterSpec(
        loss_free,
        "token",
        "sigmoid, raw or renormalised",
        "bias from the loads (state)",
        "Wang et al. 2024, 2408.15664",
        "MaxText and Megatron-LM bias steps",
        init=zero_bias,
        update=update_bias,
    ),
}
