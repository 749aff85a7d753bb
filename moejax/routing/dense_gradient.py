"""Routers whose gradient is nearer to that of the dense mixture of all experts than top-K's is.

Top-K lets a router learn from the experts it chose alone. Here it samples and corrects for that
(SparseMixer-v2), runs all experts for the gradient (DenseMixer), guesses what the others would have
said (Default MoE), or chooses differentiably (DSelect-k).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.routing.metrics import MoeStats
from moejax.routing.spec import LayerSize, RouterSpec
from moejax.routing.types import RouterInput, Routing, token_choice, token_noise


def sparsemixer2(
    r: RouterInput, *, k: int = 2, epsilon: float = 0.1, order: str = "k_major"
) -> Routing:
    """SparseMixer-v2: experts are sampled, and the weights made up for it (GRIN, Liu et al. 2024,
    2409.12136).

    Experts with (z* - z) / max(|z|, z*) > 2 epsilon, z* the largest logit, are out of the draw; p =
    softmax over the others. Training draws an expert from p, evaluation takes the best. The weight
    is m p with the gradient of p; m = 1 for the best expert, and for another one with probability
    1/4, else 1/3. The next choice is drawn in the same way from all but those drawn; the weights of
    a token do not sum to 1. (As in the authors' code the factor m is on the weight, so that experts
    get their gradient times m.)

    Raises:
      ValueError: k above E.
    """
    num_tokens, num_experts = r.logits_TE.shape
    if not 1 <= k <= num_experts:
        raise ValueError(f"sparsemixer2: need 1 <= k <= {num_experts} experts, got k={k}")
    left_TE = jnp.ones((num_tokens, num_experts), bool)
    experts, weights = [], []
    for choice in range(k):
        logits_TE = jnp.where(left_TE, r.logits_TE, -jnp.inf)
        probs_TE = jax.nn.softmax(jnp.where(near_best(logits_TE, epsilon), logits_TE, -jnp.inf))
        expert_T, factor_T = logits_TE.argmax(-1), jnp.ones(num_tokens)
        if r.key is not None:
            gumbel_TE, coin_T = token_noise(r, functools.partial(_draw, choice, num_experts))
            best_T, expert_T = expert_T, (jnp.log(probs_TE) + gumbel_TE).argmax(-1)
            whole_T = (expert_T == best_T) | (coin_T < 0.25)
            factor_T = jnp.where(whole_T, 1.0, 1 / 3)
        prob_T = jnp.take_along_axis(probs_TE, expert_T[:, None], axis=1)[:, 0]
        experts.append(expert_T)
        weights.append(prob_T + jax.lax.stop_gradient((factor_T - 1) * prob_T))
        left_TE = left_TE & ~jax.nn.one_hot(expert_T, num_experts, dtype=bool)
    scores_TE = jax.nn.softmax(r.logits_TE)
    return token_choice(r, jnp.stack(experts, 1), jnp.stack(weights, 1), scores_TE, order)


def _draw(choice: int, num_experts: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a token draws for one of its choices: Gumbel noise [E], and a coin in [0, 1)."""
    draw_key, coin_key = jax.random.split(jax.random.fold_in(key, choice))
    return jax.random.gumbel(draw_key, (num_experts,)), jax.random.uniform(coin_key)


def near_best(logits_TE: jax.Array, epsilon: float) -> jax.Array:
    """Which experts SparseMixer-v2 draws from, bool; -inf is out, the best is in."""
    logits_TE = jax.lax.stop_gradient(logits_TE)
    best_T1 = logits_TE.max(-1, keepdims=True)
    scale_TE = jnp.maximum(jnp.abs(logits_TE), best_T1)
    # Multiplied out: with all logits 0 there is nothing to divide by.
    near_TE = best_T1 - logits_TE <= 2 * epsilon * scale_TE
    return near_TE & jnp.isfinite(logits_TE)


def densemixer(r: RouterInput, *, k: int = 2, renormalise: bool = False) -> Routing:
    """DenseMixer: top-K forward, the router's gradient of the dense mixture (Yao et al. 2025).

    All experts work on all tokens: N = T E, the K chosen first, in k-major order, then the others
    with a weight of exactly 0 that has the gradient of their probability. Those give no output, and
    their experts and inputs get no gradient. Renormalised, Z = sum of the chosen p: weight p / Z,
    and for the others the gradient of p / sg(Z).

    N = T E, so what a capacity factor of 1 is to topk, k / E is here; a full expert drops what is
    only for the gradient first. It costs what the dense mixture costs, in evaluation too.

    Raises:
      ValueError: k above E; k = 1 renormalised, whose forward weight is the constant 1.
    """
    num_experts = r.logits_TE.shape[1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"densemixer: need 1 <= k <= {num_experts} experts, got k={k}")
    if k == 1 and renormalise:
        raise ValueError("densemixer with k=1 cannot be renormalised: its weight would always be 1")
    probs_TE = jax.nn.softmax(r.logits_TE)
    prob_TE, expert_TE = jax.lax.top_k(probs_TE, num_experts)
    chosen_TK, rest_TR = prob_TE[:, :k], prob_TE[:, k:]
    if renormalise:
        total_T1 = chosen_TK.sum(-1, keepdims=True)
        chosen_TK, rest_TR = chosen_TK / total_T1, rest_TR / jax.lax.stop_gradient(total_T1)
    rest_TR = rest_TR - jax.lax.stop_gradient(rest_TR)
    weight_TE = jnp.concatenate([chosen_TK, rest_TR], axis=1)
    routing = token_choice(r, expert_TE, weight_TE, probs_TE)
    return routing._replace(choice_N=jnp.where(routing.choice_N < k, routing.choice_N, -1))


def default_moe(r: RouterInput, *, k: int = 2, order: str = "k_major") -> Routing:
    """Default MoE: an expert that is not chosen gives its mean output instead (Panda et al. 2025,
    2504.12463).

    y = sum over the chosen p_e FFN_e(x) + sum over the others p_e mean_e. The means are the state,
    moved once per optimizer step by `update_means`, and have no gradient. The paper moves them
    before it uses them, which reads the future of this batch: here they are the last step's. What a
    full expert drops is not made up for.
    """
    probs_TE = jax.nn.softmax(r.logits_TE)
    weight_TK, expert_TK = jax.lax.top_k(probs_TE, k)
    chosen_TE = jax.nn.one_hot(expert_TK, probs_TE.shape[1], dtype=bool).any(1)
    rest_TE = jnp.where(chosen_TE | ~r.valid_T[:, None], 0.0, probs_TE)
    routing = token_choice(r, expert_TK, weight_TK, probs_TE, order)
    if r.state is None:
        return routing
    mean_ED = jax.lax.stop_gradient(r.state)
    rest_TD = jnp.dot(rest_TE, mean_ED, precision=jax.lax.Precision.HIGHEST)
    return routing._replace(rest_TD=rest_TD)


def zero_means(size: LayerSize) -> jax.Array:
    """The experts' mean outputs at step 0, float32 [E, D]."""
    return jnp.zeros((size.experts, size.dim), jnp.float32)


def update_means(mean_LED: jax.Array, stats: MoeStats, *, decay: float = 0.99) -> jax.Array:
    """decay mean + (1 - decay) (sum of weighted outputs / sum of weights), of the global batch.

    An expert that did nothing keeps its mean. The paper's decay is .9 to .999.
    """
    weight_LE1 = stats.weight_E[..., None]
    new_LED = stats.output_ED / jnp.where(weight_LE1 > 0, weight_LE1, 1.0)
    return jnp.where(weight_LE1 > 0, decay * mean_LED + (1 - decay) * new_LED, mean_LED)


def dselect_k(
    r: RouterInput, *, k: int = 2, gamma: float = 1.0, order: str = "token_major"
) -> Routing:
    """DSelect-k: k selectors, each a smooth binary code of an expert's number (Hazimeh et al. 2021,
    2106.03760).

    A selector has m = ceil(log2 E) further projections of the token, its bits; smooth_step makes
    each a number from 0 to 1, and an expert's share is the product of its bits' or of 1 less them.
    q = sum over selectors of softmax(a)_i share_ie is the weight, and the router's scores; experts
    of q > 0 work. All do at first; at most k once the bits are 0 or 1, which the loss
    `selector_entropy` hastens. `logits_TE` is not read. N = T E; priorities are as in `remoe`.

    Where E is no power of 2, some codes name no expert: their share is lost, q sums to less than 1,
    and the loss `selector_reach` (in the paper of weight 1) keeps selectors off them.

    sums: selector_entropy = sum over selectors of the entropy of the shares, in nats;
    selector_reach = mean over selectors of 1 / (share of all experts, 1e-3 at least).

    Raises:
      ValueError: other projections than k selectors x m bits and k selector logits.
    """
    num_tokens, num_experts = r.logits_TE.shape
    bits = code_bits(num_experts)
    if r.extra_TX is None or r.extra_TX.shape[1] != k * (bits + 1):
        raise ValueError(
            f"dselect_k: k={k} selectors of {num_experts} experts look at {k * (bits + 1)} further "
            "projections (RouterInput.extra_TX); give that many"
        )
    code_TKM = smooth_step(r.extra_TX[:, : k * bits].reshape(num_tokens, k, bits), gamma)
    number_E = np.arange(num_experts)
    bit_EM = (number_E[:, None] >> np.arange(bits)[None]) & 1 == 1
    share_TKE = jnp.where(bit_EM[None, None], code_TKM[:, :, None], 1 - code_TKM[:, :, None])
    share_TKE = share_TKE.prod(-1)
    selector_TK = jax.nn.softmax(r.extra_TX[:, k * bits :])
    scores_TE = jnp.einsum("tk,tke->te", selector_TK, share_TKE)

    _, expert_TE = jax.lax.top_k(jax.lax.stop_gradient(scores_TE), num_experts)
    weight_TE = jnp.take_along_axis(scores_TE, expert_TE, axis=1)
    expert_TE = jnp.where(weight_TE > 0, expert_TE, num_experts)
    log_TKE = jnp.log(jnp.where(share_TKE > 0, share_TKE, 1.0))
    reach_TK = jnp.maximum(share_TKE.sum(-1), 1e-3)
    sums_T = {
        "selector_entropy": -(share_TKE * log_TKE).sum((1, 2)),
        "selector_reach": (1 / reach_TK).mean(1),
    }
    sums = {name: jnp.where(r.valid_T, sum_T, 0.0).sum() for name, sum_T in sums_T.items()}
    return token_choice(r, expert_TE, weight_TE, scores_TE, order)._replace(sums=sums)


def smooth_step(t: jax.Array, gamma: float) -> jax.Array:
    """0 up to -gamma / 2, 1 from gamma / 2 on, a cubic without kinks between."""
    t = jnp.clip(t / gamma, -0.5, 0.5)
    return -2 * t**3 + 1.5 * t + 0.5


def code_bits(num_experts: int) -> int:
    """Bits of an expert's number: ceil(log2 E)."""
    return max(1, math.ceil(math.log2(num_experts)))


def selector_columns(num_experts: int, *, k: int = 2) -> int:
    """Projections of a token: k selectors x bits, then the k selectors' logits."""
    return k * (code_bits(num_experts) + 1)


def small_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """U(-1/100, 1/100): all codes start in the middle, where smooth_step is steepest."""
    return jax.random.uniform(key, shape, minval=-0.01, maxval=0.01)


ROUTERS = {
    "sparsemixer2": RouterSpec(
        sparsemixer2,
        "token",
        "softmax over near experts, raw",
        "load_balance loss",
        "Liu et al. 2024, 2409.12136",
        "means over draws against their expectation",
    ),
    "densemixer": RouterSpec(
        densemixer,
        "token",
        "softmax, raw or renormalised",
        "load_balance loss",
        "Yao et al. 2025",
        "the dense mixture's gradient",
        every_expert=True,
    ),
    "default_moe": RouterSpec(
        default_moe,
        "token",
        "softmax, raw",
        "load_balance loss",
        "Panda et al. 2025, 2504.12463",
        "the dense mixture's gradient, experts being constant",
        init=zero_means,
        update=update_means,
    ),
    "dselect_k": RouterSpec(
        dselect_k,
        "token",
        "smooth binary codes",
        "none; selector_entropy, selector_reach losses",
        "Hazimeh et al. 2021, 2106.03760",
        "shares by hand, and their sums",
        every_expert=True,
        columns=selector_columns,
        weights=small_uniform,
    ),
}
