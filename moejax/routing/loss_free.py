"""Balance without a loss: a bias per expert, moved after every optimizer step by the loads.

The bias decides who is chosen, never how much it counts, so it puts nothing into the gradient. The
rules differ in how the loads move it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.routing.metrics import MoeStats
from moejax.routing.spec import LayerSize, RouterSpec
from moejax.routing.types import RouterInput, Routing, token_choice

SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}


def loss_free(
    r: RouterInput,
    *,
    k: int = 2,
    renormalise: bool = False,
    score: str = "sigmoid",
    rule: str = "sign",
    order: str = "token_major",
) -> Routing:
    """Auxiliary-loss-free balancing (Wang et al. 2024, 2408.15664): choose TopK(s + b).

    weight = s, or s divided by the sum of the chosen s (DeepSeek-V3, 2412.19437). The bias b is the
    router's state, moved once per optimizer step by `updated_bias`; it has no gradient. The rule
    'multiplicative' chooses TopK(s b) instead, from b = 1.

    Args:
      r: the router's input; a state of None chooses by s alone.
      k: experts per token.
      renormalise: weights that sum to 1.
      score: s = 'sigmoid' or 'softmax' of the logits; with softmax the paper needs a proportional
        rule.
      rule: see RULES.
      order: see `token_choice`.

    Raises:
      ValueError: unknown score or rule; k = 1 renormalised, whose router gradient is zero.
    """
    if k == 1 and renormalise:
        raise ValueError(
            "loss_free with k=1 cannot be renormalised: weight 1 gives the router no gradient"
        )
    known("score", score, SCORES)
    known("rule", rule, RULES)
    scores_TE = SCORES[score](r.logits_TE)
    biased_TE = scores_TE
    if r.state is not None:
        times = rule == "multiplicative"
        biased_TE = scores_TE * r.state[None] if times else scores_TE + r.state[None]
    _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(biased_TE), k)
    weight_TK = jnp.take_along_axis(scores_TE, expert_TK, axis=-1)
    if renormalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdims=True) + 1e-20)
    return token_choice(r, expert_TK, weight_TK, scores_TE, order)


def sign(load_E: jax.Array) -> jax.Array:
    """+1 for experts below the mean load, -1 above it, 0 on it (Wang et al. 2024, algorithm 1)."""
    return jnp.sign(load_E.mean(-1, keepdims=True) - load_E)


def proportional(load_E: jax.Array) -> jax.Array:
    """(mean - load) / mean. The paper takes the bare difference, whose rate depends on the batch's
    size; dividing by the mean is our reading."""
    mean_E1 = load_E.mean(-1, keepdims=True)
    return (mean_E1 - load_E) / jnp.maximum(mean_E1, 1e-9)


# How the loads move the bias, in units of bias_rate. 'centred': the bias then has the mean 0.
RULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sign": sign,
    "proportional": proportional,
    "multiplicative": sign,
    "sign_centred": sign,
    "proportional_centred": proportional,
}


def updated_bias(
    bias_E: jax.Array, load_E: jax.Array, *, bias_rate: float = 1e-3, rule: str = "sign"
) -> jax.Array:
    """The bias one optimizer step later, b + bias_rate x RULES[rule](n): up for experts below the
    mean load, down above it.

    n = assignments before dropping in the whole global batch; the last axis is that of experts. By
    sign |b| is at most bias_rate x steps: short runs need a larger rate than the paper's 1e-3.

    Raises:
      ValueError: unknown rule.
    """
    known("rule", rule, RULES)
    bias_E = bias_E + bias_rate * RULES[rule](load_E.astype(jnp.float32))
    if rule.endswith("_centred"):
        bias_E = bias_E - bias_E.mean(-1, keepdims=True)
    return bias_E


def first_bias(size: LayerSize, *, rule: str = "sign") -> jax.Array:
    """The bias at step 0: zeros; ones where it multiplies."""
    return jnp.full(size.experts, 1.0 if rule == "multiplicative" else 0.0, jnp.float32)


def update_bias(
    bias_LE: jax.Array, stats: MoeStats, *, bias_rate: float = 1e-3, rule: str = "sign"
) -> jax.Array:
    """`updated_bias` from the loads of the global batch."""
    return updated_bias(bias_LE, stats.load_E, bias_rate=bias_rate, rule=rule)


def known(what: str, name: str, names: dict[str, Callable[..., jax.Array]]) -> None:
    """Raises ValueError where the name is not one of these."""
    if name not in names:
        raise ValueError(f"unknown {what}={name!r}: use one of {', '.join(names)}")


ROUTERS = {
    "loss_free": RouterSpec(
        loss_free,
        "token",
        "sigmoid or softmax, raw or renormalised",
        "bias from the loads (state)",
        "Wang et al. 2024, 2408.15664",
        "MaxText and Megatron-LM bias steps, torchtitan's centred one",
        init=first_bias,
        update=update_bias,
    ),
}
