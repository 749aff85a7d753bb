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
from moejax.routing.dense_gradient import near_best


class Problem(NamedTuple):
    """Logits [T, E], expert outputs [T, E, D], targets [T, D], all float32."""

    logits_TE: jax.Array
    v_TED: jax.Array
    target_TD: jax.Array


class Quality(NamedTuple):
    """A router's gradient against an exact one, g, over all tokens of all problems.

    Attributes:
      cosine: between the mean gradient over draws and g.
      bias: |mean - g| / |g|.
      deviation: root of the summed variance over draws, / |g|; 0 for a router that draws nothing.
    """

    cosine: jax.Array
    bias: jax.Array
    deviation: jax.Array


def random_problem(
    key: jax.Array, *, tokens: int = 12, experts: int = 6, dim: int = 4, scale: Any = 1.0
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


class Moments(NamedTuple):
    """What a `Quality` is made of, summed over problems: m = mean gradient, g = the exact one."""

    mg: jax.Array
    mm: jax.Array
    gg: jax.Array
    off: jax.Array
    variance: jax.Array


def moments(router: Router, problem: Problem, exact_TE: jax.Array, keys: jax.Array) -> Moments:
    """The router's gradient over the draws of `keys`, and an exact one."""
    draws = jax.vmap(lambda key: router_gradient(router, problem, key))(keys)
    mean_TE = draws.mean(0)
    return Moments(
        mg=jnp.vdot(mean_TE, exact_TE),
        mm=jnp.square(mean_TE).sum(),
        gg=jnp.square(exact_TE).sum(),
        off=jnp.square(mean_TE - exact_TE).sum(),
        variance=jnp.square(draws - mean_TE[None]).mean(0).sum(),
    )


def quality(sums: Moments) -> Quality:
    """The figures of one problem, or of several whose moments were added up."""
    return Quality(
        cosine=sums.mg / jnp.sqrt(jnp.maximum(sums.mm * sums.gg, 1e-30)),
        bias=jnp.sqrt(sums.off / sums.gg),
        deviation=jnp.sqrt(sums.variance / sums.gg),
    )


def average_quality(
    name: str,
    options: dict[str, Any] | None = None,
    *,
    against: str = "dense",
    scale: float = 1.0,
    experts: int = 6,
    problems: int = 32,
    draws: int = 64,
) -> Quality:
    """The `Quality` of a router over random problems.

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
    if against == "expected" and name not in OUTCOMES:
        raise ValueError(f"the draws of {name} are not enumerated; known: {', '.join(OUTCOMES)}")
    pairs = tuple((options or {}).items())
    return _averaged(name, pairs, against == "expected", experts, problems, draws)(scale)


@functools.cache
def _averaged(
    name: str,
    options: tuple[tuple[str, Any], ...],
    enumerated: bool,
    experts: int,
    problems: int,
    draws: int,
) -> Callable[[float], Quality]:
    """The compiled function of the scale."""
    router = make_router(name, dict(options))

    def one(key: jax.Array, scale: jax.Array) -> Moments:
        problem_key, draw_key = jax.random.split(key)
        problem = random_problem(problem_key, experts=experts, scale=scale)
        if enumerated:
            exact_TE = expected_gradient(
                functools.partial(OUTCOMES[name], **dict(options)), problem
            )
        else:
            exact_TE = dense_gradient(router, problem)
        return moments(router, problem, exact_TE, jax.random.split(draw_key, draws))

    def averaged(scale: jax.Array) -> Quality:
        keys = jax.random.split(jax.random.key(0), problems)
        return quality(jax.tree.map(jnp.sum, jax.lax.map(lambda key: one(key, scale), keys)))

    return jax.jit(averaged)


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


def sparsemixer_outcomes(logits_TE: jax.Array, *, k: int = 1, epsilon: float = 0.1) -> Outcomes:
    """GRIN's draw of one expert, and its coin for the size of what is not the best one."""
    near_TE = near_best(logits_TE, epsilon)
    probs_TE = jax.nn.softmax(jnp.where(near_TE, logits_TE, -jnp.inf))
    best_TE = logits_TE == logits_TE.max(-1, keepdims=True)
    whole_TE = jnp.where(best_TE, 1.0, 0.25)
    chance_TX = jnp.concatenate([probs_TE * whole_TE, probs_TE * (1 - whole_TE)], -1)
    weight_TX = jnp.concatenate([probs_TE, probs_TE / 3], -1)
    one_hot_XE = jnp.tile(jnp.eye(logits_TE.shape[-1]), (2, 1))
    return chance_TX.T, weight_TX.T[..., None] * one_hot_XE[:, None]


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
