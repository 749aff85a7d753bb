"""Quantile balancing: a threshold per expert, set where its fair share of tokens would be above it.

Dual descent on the assignment that maximises the chosen scores, K experts a token, K T / E tokens
an expert (J. Su's series of posts on mixtures of experts; in Megatron-LM and Marin). One step
solves for the thresholds instead of creeping towards them.

A quantile of the whole global batch is no sum, but a histogram is one: `Routing.sums` counts each
expert's margins in fixed bins, and the update reads the quantile from the counts, to a bin's width.
So it does not depend on how a batch was cut. `quantile_beta` is the exact one.
"""

import jax
import jax.numpy as jnp

from moejax.routing.loss_free import SCORES, known
from moejax.routing.metrics import MoeStats
from moejax.routing.spec import LayerSize, RouterSpec
from moejax.routing.types import RouterInput, Routing, token_choice

# Scores are within 1 of each other, hence also the thresholds, and margins within 2 of 0.
RANGE = 2.0


def quantile_balancing(
    r: RouterInput,
    *,
    k: int = 2,
    renormalise: bool = False,
    score: str = "sigmoid",
    bins: int = 2048,
    order: str = "token_major",
) -> Routing:
    """Choose TopK(s - beta); weight = s, or s divided by the sum of the chosen s.

    Args:
      r: the router's input; its state is beta_E, None = zeros.
      k: experts per token, fewer than E.
      renormalise: weights that sum to 1.
      score: s = 'sigmoid' or 'softmax' of the logits.
      bins: Q of the histogram margin_EQ; each group of tokens makes one.
      order: see `token_choice`.

    Raises:
      ValueError: k >= E: nothing is left out, so there is no threshold; k = 1 renormalised, whose
        router gradient is zero; unknown score.
    """
    num_experts = r.logits_TE.shape[-1]
    if k >= num_experts:
        raise ValueError(f"quantile_balancing: k={k} of {num_experts} experts; needs k < experts")
    if k == 1 and renormalise:
        raise ValueError("quantile_balancing with k=1 renormalised: weight 1 has no gradient")
    known("score", score, SCORES)
    scores_TE = SCORES[score](r.logits_TE)
    fixed_TE = jax.lax.stop_gradient(scores_TE)
    beta_E = jnp.zeros(num_experts) if r.state is None else r.state
    best_TK, expert_TK = jax.lax.top_k(fixed_TE - beta_E[None], k + 1)
    expert_TK, alpha_T1 = expert_TK[:, :k], best_TK[:, k:]
    weight_TK = jnp.take_along_axis(scores_TE, expert_TK, axis=-1)
    if renormalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdims=True) + 1e-20)
    margin_TE = fixed_TE - beta_E[None] - alpha_T1
    routing = token_choice(r, expert_TK, weight_TK, scores_TE, order)
    return routing._replace(sums={"margin_EQ": histogram(margin_TE, r.valid_T, bins)})


def histogram(margin_TE: jax.Array, valid_T: jax.Array, bins: int) -> jax.Array:
    """How many valid tokens are in each of Q bins over [-2, 2], int32 [E, Q].

    Bins are equal in the root of the margin, so that they are finest around 0, where the quantile
    is once the thresholds are right. What is outside counts at the end.
    """
    num_experts = margin_TE.shape[-1]
    root_TE = jnp.sign(margin_TE) * jnp.sqrt(jnp.abs(margin_TE) / RANGE)
    bin_TE = jnp.clip(jnp.floor((root_TE + 1) * (bins / 2)).astype(jnp.int32), 0, bins - 1)
    expert_TE = jnp.broadcast_to(jnp.arange(num_experts)[None], bin_TE.shape)
    one_TE = jnp.broadcast_to(valid_T[:, None].astype(jnp.int32), bin_TE.shape)
    return jnp.zeros((num_experts, bins), jnp.int32).at[expert_TE, bin_TE].add(one_TE)


def quantile_beta(
    scores_TE: jax.Array, beta_E: jax.Array, k: int, offset: float = 0.5
) -> jax.Array:
    """The new thresholds exactly, from all scores at once, before any averaging or centring.

    alpha_t is the K+1-st largest of s - beta, what a score must exceed to be chosen. With n = K T /
    E, beta*_e is the s - alpha of rank n + offset, rank 1 being the largest and ranks between
    tokens interpolated. offset 1 is Megatron-LM's, 0 Marin's; both put a token on the threshold,
    which the midpoint .5 avoids.
    """
    num_tokens, num_experts = scores_TE.shape
    alpha_T1 = jax.lax.top_k(scores_TE - beta_E[None], k + 1)[0][:, -1:]
    falling_TE = -jnp.sort(-(scores_TE - alpha_T1), axis=0)
    rank = jnp.clip(k * num_tokens / num_experts + offset, 1, num_tokens)
    above = jnp.floor(rank).astype(jnp.int32)
    below = jnp.minimum(above + 1, num_tokens)
    share = rank - above
    return (1 - share) * falling_TE[above - 1] + share * falling_TE[below - 1]


def quantile_of(histogram_Q: jax.Array, count: jax.Array) -> jax.Array:
    """The margin above which `count` of a histogram's tokens lie, these being spread evenly over
    the root in their bin; between two tokens that are bins apart, the middle."""
    bins = histogram_Q.shape[0]
    # above[q]: tokens above the lower edge of bin q; falls from all of them to 0 at the upper end.
    above = jnp.concatenate([jnp.cumsum(histogram_Q[::-1])[::-1], jnp.zeros(1, jnp.int32)])
    above = above.astype(jnp.float32)
    count = jnp.clip(count, 0.0, above[0])
    first = jnp.argmax(above <= count)  # above[first - 1] > count >= above[first]
    last = bins - jnp.argmax(above[::-1] >= count)  # above[last] >= count > above[last + 1]
    in_left = jnp.maximum(above[first - 1] - above[first], 1.0)
    in_right = jnp.maximum(above[last] - above[jnp.minimum(last + 1, bins)], 1.0)
    low = first - jnp.where(first > 0, (count - above[first]) / in_left, 0.0)
    high = last + jnp.where(last < bins, (above[last] - count) / in_right, 0.0)
    root = jnp.stack([low, high]) * (2 / bins) - 1
    return (RANGE * jnp.sign(root) * jnp.square(root)).mean()


def update_beta(
    beta_LE: jax.Array,
    stats: MoeStats,
    *,
    ema: float = 0.0,
    centre: bool = True,
    offset: float = 0.5,
) -> jax.Array:
    """beta one optimizer step later: ema beta + (1 - ema) beta*, then, centred, less its mean.

    beta* = beta + the quantile of the margins s - beta - alpha, from the histograms of the whole
    global batch; `offset` as in `quantile_beta`. A batch without tokens changes nothing.
    """
    count_L = stats.load_E.astype(jnp.float32).mean(-1) + (offset - 0.5)
    of_layer = jax.vmap(quantile_of, in_axes=(0, None))
    star_LE = beta_LE + jax.vmap(of_layer)(stats.own["margin_EQ"], count_L)
    next_LE = ema * beta_LE + (1 - ema) * star_LE
    if centre:
        next_LE = next_LE - next_LE.mean(-1, keepdims=True)
    return jnp.where(stats.tokens[:, None] > 0, next_LE, beta_LE)


def zero_beta(size: LayerSize) -> jax.Array:
    """beta at step 0."""
    return jnp.zeros(size.experts, jnp.float32)


ROUTERS = {
    "quantile_balancing": RouterSpec(
        quantile_balancing,
        "token",
        "sigmoid or softmax, raw or renormalised",
        "thresholds at the loads' quantiles (state)",
        "J. Su, posts on mixtures of experts; Megatron-LM",
        "Megatron-LM's thresholds; the histogram against exact quantiles",
        init=zero_beta,
        update=update_beta,
    ),
}
