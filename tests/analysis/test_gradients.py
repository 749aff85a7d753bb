"""The exact gradients that a router's own is held against, and the figures made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis.gradients import (
    OUTCOMES,
    Problem,
    average_quality,
    dense_gradient,
    expected_gradient,
    mixture_loss,
    moments,
    quality,
    random_problem,
    router_gradient,
)
from moejax.routing import RouterInput, combine_TE, make_router


def test_dense_gradient_by_hand() -> None:
    # One token, p = (.5, .5), outputs 1 and 0, target 0: y = .5, L = y^2 / 2, dL/dy = .5,
    # dy/dz = p1 p2 (1, -1) = (.25, -.25): dL/dz = (.125, -.125).
    problem = Problem(jnp.zeros((1, 2)), jnp.asarray([[[1.0], [0.0]]]), jnp.zeros((1, 1)))
    got_TE = dense_gradient(make_router("topk", {"k": 1}), problem)
    np.testing.assert_allclose(got_TE, [[0.125, -0.125]], rtol=1e-6)
    # Top-1 sees expert 0 alone: y = p1 x 1 = .5 as well, and the same gradient: v2 is 0.
    got_TE = router_gradient(make_router("topk", {"k": 1}), problem, None)
    np.testing.assert_allclose(got_TE, [[0.125, -0.125]], rtol=1e-6)


def test_a_router_that_asks_every_expert_has_the_exact_gradient() -> None:
    problem = random_problem(jax.random.key(0), experts=4)
    router, keys = make_router("topk", {"k": 4}), jax.random.split(jax.random.key(1), 3)
    found = quality(moments(router, problem, dense_gradient(router, problem), keys))
    assert found.cosine == pytest.approx(1.0, abs=1e-5)
    assert float(found.bias) < 1e-5 and float(found.deviation) < 1e-5


@pytest.mark.parametrize("name", OUTCOMES)
def test_enumerated_outcomes_are_those_of_the_router(name: str) -> None:
    """Chances sum to 1, and the mean loss over many draws is the enumerated expectation."""
    problem = random_problem(jax.random.key(3), tokens=3, experts=3)
    chance_XT, weight_XTE = OUTCOMES[name](problem.logits_TE)
    np.testing.assert_allclose(chance_XT.sum(0), 1.0, atol=5e-3)
    y_XTD = jnp.einsum("xte,ted->xtd", weight_XTE, problem.v_TED)
    want = (chance_XT * 0.5 * jnp.square(y_XTD - problem.target_TD[None]).sum(-1)).sum()
    router = make_router(name, {"k": 1} if name == "sparsemixer2" else {})
    extra_TX = jnp.zeros((3, router.columns(3)))

    def loss(key: jax.Array) -> jax.Array:
        r = RouterInput(problem.logits_TE, jnp.ones(3, bool), key, extra_TX=extra_TX)
        return mixture_loss(problem, combine_TE(router.route(r)))

    losses = jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(4), 20_000))
    error = 5 * float(losses.std()) / 20_000**0.5
    assert float(losses.mean()) == pytest.approx(float(want), abs=error + 5e-3 * float(want))


def test_expected_gradient_is_the_slope_of_the_expected_loss() -> None:
    problem, h = random_problem(jax.random.key(5), tokens=2, experts=3), 1e-2
    got_TE = expected_gradient(OUTCOMES["gshard_top2"], problem)

    def expected(logits_TE: jax.Array) -> float:
        chance_XT, weight_XTE = OUTCOMES["gshard_top2"](logits_TE)
        y_XTD = jnp.einsum("xte,ted->xtd", weight_XTE, problem.v_TED)
        return float((chance_XT * 0.5 * jnp.square(y_XTD - problem.target_TD[None]).sum(-1)).sum())

    for t, e in np.ndindex(2, 3):
        step_TE = jnp.zeros((2, 3)).at[t, e].set(h)
        slope = (expected(problem.logits_TE + step_TE) - expected(problem.logits_TE - step_TE)) / (
            2 * h
        )
        assert float(got_TE[t, e]) == pytest.approx(slope, abs=2e-3)


def test_figures_of_known_routers() -> None:
    sizes = {"problems": 8, "draws": 32}
    raw = average_quality("topk", {"k": 2}, **sizes)
    coin = average_quality("gshard_top2", **sizes)
    assert 0.6 < raw.cosine < 0.99 and 0.1 < raw.bias < 1 and raw.deviation == pytest.approx(0.0)
    assert coin.deviation > 0.05  # its coin
    more = average_quality("topk", {"k": 5}, **sizes)
    assert more.cosine > raw.cosine and more.bias < raw.bias  # the more experts, the less bias
    with pytest.raises(ValueError, match="draws of topk are not enumerated; known: gshard"):
        average_quality("topk", against="expected")
