"""How good a router's gradient is: its bias and its variance, against exact gradients.

A problem is a few tokens, each with the fixed output v_TED of every expert and a target. The loss
is L = sum_t |y_t - target_t|^2 / 2 with y_t = sum_e w_te v_te, and what is judged is dL/dlogits, as
training would form it through the routing's weights. Two exact gradients to hold it against:

  dense     of the mixture of *all* experts, y_t = sum_e p_te v_te with p the router's scores: what
            the router would learn if every expert were asked.
  expected  of E[L] over the router's own draws, for routers that draw in training. The draws are
            enumerated, so it includes how the *probability* of each outcome moves, which
            differentiating one draw may leave out.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.routing import LayerSize, Router, RouterInput, combine_TE, make_router


class Problem(NamedTuple):
    """Logits [T, E], expert outputs [T, E, D], targets [T, D], all float32."""

    logits_TE: jax.Array
    v_TED: jax.Array
    target_TD: jax.Array


class Quality(NamedTuple):
    """One router's gradient against one exact gradient g, over all tokens of a problem.

    Attributes:
      cosine: between the mean gradient over draws and g.
      bias: |mean - g| / |g|.
      deviation: root of the summed variance over draws, / |g|; 0 for a router that draws nothing.
    """

    cosine: jax.Array
    bias: jax.Array
    deviation: jax.Array


def random_problem(
    key: jax.Array, *, tokens: int = 8, experts: int = 6, dim: int = 4, scale: float = 1.0
) -> Problem:
    """Normal logits of the given scale, normal outputs and targets."""
    keys = jax.random.split(key, 3)
    return Problem(
        scale * jax.random.normal(keys[0], (tokens, experts)),
        jax.random.normal(keys[1], (tokens, experts, dim)),
        jax.random.normal(keys[2], (tokens, dim)),
    )


def mixture_loss(problem: Problem, weight_TE: jax.Array) -> jax.Array:
    """L of the mixture with these weights."""
    y_TD = jnp.einsum("te,ted->td", weight_TE, problem.v_TED)
    return 0.5 * jnp.square(y_TD - problem.target_TD).sum()


def router_gradient(router: Router, problem: Problem, key: jax.Array | None) -> jax.Array:
    """dL/dlogits [T, E] as training forms it, for one draw."""
    num_tokens, num_experts = problem.logits_TE.shape

    def loss(logits_TE: jax.Array) -> jax.Array:
        routing = router.route(_input(router, logits_TE, key))
        return mixture_loss(problem, combine_TE(routing))

    return jax.grad(loss)(problem.logits_TE)


def dense_gradient(router: Router, problem: Problem) -> jax.Array:
    """dL/dlogits [T, E] of the mixture of all experts, weighed by the router's scores."""

    def loss(logits_TE: jax.Array) -> jax.Array:
        return mixture_loss(problem, router.route(_input(router, logits_TE, None)).scores_TE)

    return jax.grad(loss)(problem.logits_TE)


Outcomes = tuple[jax.Array, jax.Array]  # probabilities [X, T] and weights [X, T, E] of X outcomes


def expected_gradient(outcomes: Callable[[jax.Array], Outcomes], problem: Problem) -> jax.Array:
    """dE[L]/dlogits [T, E], the outcomes of a token's draw enumerated.

    Args:
      outcomes: logits_TE to each outcome's probability and weights, both differentiable. Tokens
        draw by themselves, so E[L] is the sum over tokens of their expected losses.
      problem: what to route.
    """

    def loss(logits_TE: jax.Array) -> jax.Array:
        chance_XT, weight_XTE = outcomes(logits_TE)
        y_XTD = jnp.einsum("xte,ted->xtd", weight_XTE, problem.v_TED)
        loss_XT = 0.5 * jnp.square(y_XTD - problem.target_TD[None]).sum(-1)
        return (chance_XT * loss_XT).sum()

    return jax.grad(loss)(problem.logits_TE)


def quality(router: Router, problem: Problem, exact_TE: jax.Array, keys: jax.Array) -> Quality:
    """The router's gradient over the draws of `keys` against an exact one."""
    draws = jax.vmap(lambda key: router_gradient(router, problem, key))(keys)
    mean_TE, size = draws.mean(0), jnp.linalg.norm(exact_TE)
    return Quality(
        cosine=jnp.vdot(mean_TE, exact_TE) / (jnp.linalg.norm(mean_TE) * size + 1e-20),
        bias=jnp.linalg.norm(mean_TE - exact_TE) / size,
        deviation=jnp.sqrt(jnp.square(draws - mean_TE[None]).mean(0).sum()) / size,
    )


def average_quality(
    name: str,
    options: dict[str, Any] | None = None,
    *,
    against: str = "dense",
    scale: float = 1.0,
    experts: int = 6,
    problems: int = 64,
    draws: int = 256,
) -> Quality:
    """The mean `Quality` of a router over random problems.

    Args:
      name: of ROUTERS.
      options: its hyper-parameters.
      against: 'dense' or 'expected' (routers of OUTCOMES only).
      scale: standard deviation of the logits: how sure of itself the router is.
      experts: E; few of them where outcomes are enumerated.
      problems, draws: how many of each.

    Raises:
      ValueError: 'expected' for a router whose draws are not enumerated.
    """
    options = dict(options or {})
    router = make_router(name, options)
    if against == "expected" and name not in OUTCOMES:
        raise ValueError(f"the draws of {name} are not enumerated; known: {', '.join(OUTCOMES)}")

    def one(key: jax.Array) -> Quality:
        problem_key, draw_key = jax.random.split(key)
        problem = random_problem(problem_key, experts=experts, scale=scale)
        if against == "expected":
            outcomes = functools.partial(OUTCOMES[name], **options)
            exact_TE = expected_gradient(outcomes, problem)
        else:
            exact_TE = dense_gradient(router, problem)
        return quality(router, problem, exact_TE, jax.random.split(draw_key, draws))

    keys = jax.random.split(jax.random.key(0), problems)
    return jax.tree.map(jnp.mean, jax.jit(lambda k: jax.lax.map(one, k))(keys))


def gshard_outcomes(logits_TE: jax.Array, *, second: str = "random", k: int = 2) -> Outcomes:
    """GShard's coin: the second choice stays with probability min(1, 2 w2)."""
    weight_TK, expert_TK = jax.lax.top_k(jax.nn.softmax(logits_TE), 2)
    weight_TK = weight_TK / weight_TK.sum(-1, keepdims=True)
    chosen_TKE = jax.nn.one_hot(expert_TK, logits_TE.shape[-1])
    stays_T = jnp.minimum(1.0, 2.0 * weight_TK[:, 1])
    first_TE, second_TE = weight_TK[:, :1] * chosen_TKE[:, 0], weight_TK[:, 1:] * chosen_TKE[:, 1]
    return jnp.stack([stays_T, 1 - stays_T]), jnp.stack([first_TE + second_TE, first_TE])


def noisy_outcomes(logits_TE: jax.Array, *, k: int = 2) -> Outcomes:
    """Shazeer's noise of standard deviation softplus(0): softmax over the k highest."""

    def weights(h_XTE: jax.Array) -> jax.Array:
        kth_XT1 = jax.lax.top_k(h_XTE, k)[0][..., -1:]
        return jax.nn.softmax(jnp.where(h_XTE >= kth_XT1, h_XTE, -jnp.inf))

    return _gaussian(logits_TE, math.log(2.0), weights)


def vmoe_outcomes(logits_TE: jax.Array, *, k: int = 2) -> Outcomes:
    """V-MoE's noise of standard deviation 1 / E: the k highest of the noisy softmax, raw."""

    def weights(h_XTE: jax.Array) -> jax.Array:
        probs_XTE = jax.nn.softmax(h_XTE)
        return jnp.where(probs_XTE >= jax.lax.top_k(probs_XTE, k)[0][..., -1:], probs_XTE, 0.0)

    return _gaussian(logits_TE, 1.0 / logits_TE.shape[-1], weights)


def _gaussian(
    logits_TE: jax.Array, std: float, weights: Callable[[jax.Array], jax.Array]
) -> Outcomes:
    """Gaussian noise by the midpoint rule: points fixed in space, whose density moves with the
    logits."""
    num_experts = logits_TE.shape[-1]
    step = 2 * _REACH / _POINTS
    line = -_REACH + step * (jnp.arange(_POINTS) + 0.5)
    grid_XE = jnp.stack(jnp.meshgrid(*[line] * num_experts), -1).reshape(-1, num_experts)
    h_XTE = jax.lax.stop_gradient(logits_TE)[None] + std * grid_XE[:, None]
    density_XT = jax.scipy.stats.norm.pdf((h_XTE - logits_TE[None]) / std).prod(-1)
    return density_XT * step**num_experts, weights(h_XTE)


_REACH, _POINTS = 4.0, 20  # of the grid: standard deviations to each side, points an expert


def sparsemixer_outcomes(logits_TE: jax.Array, *, k: int = 1, eps: float = 0.1) -> Outcomes:
    """GRIN's draw of one expert, and its coin for the size of what is not the best one."""
    best_T1 = logits_TE.max(-1, keepdims=True)
    scale_TE = jnp.maximum(jnp.abs(logits_TE), best_T1)
    kept_TE = (best_T1 - logits_TE) / scale_TE <= 2 * eps
    probs_TE = jax.nn.softmax(jnp.where(kept_TE, logits_TE, -jnp.inf))
    whole_TE = jnp.where(logits_TE == best_T1, 1.0, 0.25)
    chance_TE = jnp.concatenate([probs_TE * whole_TE, probs_TE * (1 - whole_TE)], -1)
    weight_TE = jnp.concatenate([probs_TE, probs_TE / 3], -1)
    one_hot_XE = jnp.tile(jnp.eye(logits_TE.shape[-1]), (2, 1))
    return chance_TE.T, weight_TE.T[..., None] * one_hot_XE[:, None]


OUTCOMES: dict[str, Callable[..., Outcomes]] = {
    "gshard_top2": gshard_outcomes,
    "noisy_topk": noisy_outcomes,
    "vmoe": vmoe_outcomes,
    "sparsemixer2": sparsemixer_outcomes,
}


def _input(router: Router, logits_TE: jax.Array, key: jax.Array | None) -> RouterInput:
    num_tokens, num_experts = logits_TE.shape
    ids_T = jnp.arange(num_tokens, dtype=jnp.int32)
    columns = router.columns(num_experts)
    return RouterInput(
        logits_TE,
        jnp.ones(num_tokens, bool),
        key,
        router.init(LayerSize(num_experts, 0, num_tokens, jnp.ones(num_tokens))),
        ids_T,
        ids_T,
        jnp.zeros((num_tokens, columns)) if columns else None,
    )
