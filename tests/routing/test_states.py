"""Routers with a state: moved once per optimizer step, the same however the batch is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import Experts
from moejax.moe import MoeOptions, MoeParams, moe
from moejax.routing import ROUTERS, LayerSize, make_router

EXPERTS, DIM, ROWS, LENGTH, VOCAB = 4, 6, 4, 8, 16
WITH_STATE = [name for name, spec in ROUTERS.items() if spec.init is not None]
MOVING = [name for name in WITH_STATE if ROUTERS[name].update is not None]
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


X_BSD = normal(ROWS, LENGTH, DIM)
TOKEN_BS = jnp.asarray(RANDOM.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
VALID_BS = jnp.asarray(RANDOM.random((ROWS, LENGTH)) < 0.8)
EXPERTS_OF = Experts(normal(EXPERTS, DIM, DIM), normal(EXPERTS, DIM, DIM))
SIZE = LayerSize(EXPERTS, DIM, VOCAB, jnp.arange(1.0, VOCAB + 1))


def next_state(name: str, parts: int):
    """The state of two layers after one step whose batch is cut into parts."""
    router = make_router(name)
    state = router.init(SIZE)
    columns = router.columns(EXPERTS)
    extra = jnp.ones((DIM, columns)) / DIM if columns else None
    p = MoeParams(
        jnp.sin(jnp.arange(1.0, DIM * EXPERTS + 1)).reshape(DIM, EXPERTS), EXPERTS_OF, extra
    )
    options = MoeOptions(router, activation="relu", groups="sequence")

    @jax.jit
    def statistics(x_BSD, valid_BS, token_BS):
        return moe(p, x_BSD, options=options, valid_BS=valid_BS, token_BS=token_BS, state=state)[1]

    size = ROWS // parts
    cuts = [slice(i * size, (i + 1) * size) for i in range(parts)]
    whole = [statistics(X_BSD[rows], VALID_BS[rows], TOKEN_BS[rows]) for rows in cuts]
    stats = jax.tree.map(lambda *a: jnp.stack([sum(a), sum(a)]), *whole)
    state_L = jax.tree.map(lambda a: jnp.stack([a, a]), state)
    return state_L, router.update(state_L, stats)


@pytest.mark.parametrize("name", MOVING)
def test_the_next_state_does_not_depend_on_how_the_batch_is_cut(name: str) -> None:
    before, whole = next_state(name, 1)
    _, parts = next_state(name, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), before, whole)
    assert max(jax.tree.leaves(moved)) > 0
    assert jax.tree.structure(before) == jax.tree.structure(whole)
    assert all(
        a.dtype == b.dtype and a.shape == b.shape
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(whole), strict=True)
    )


@pytest.mark.parametrize("name", sorted(set(WITH_STATE) - set(MOVING)))
def test_a_state_without_a_rule_stays(name: str) -> None:
    jax.tree.map(np.testing.assert_array_equal, *next_state(name, 2))


def test_there_are_routers_of_both_kinds() -> None:
    assert "loss_free" in MOVING and "topk" not in WITH_STATE


@pytest.mark.parametrize("name", WITH_STATE)
def test_no_gradient_reaches_the_state(name: str) -> None:
    router = make_router(name)
    state = router.init(SIZE)
    if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(state)):
        assert name == "hash"  # a table of whole numbers
        return
    extra = jnp.ones((DIM, router.columns(EXPERTS))) if router.columns(EXPERTS) else None
    p = MoeParams(jnp.ones((DIM, EXPERTS)), EXPERTS_OF, extra)
    options = MoeOptions(router, activation="relu", groups="sequence")

    def output(state):
        return moe(p, X_BSD, options=options, valid_BS=VALID_BS, state=state)[0].sum()

    moved = jax.tree.map(lambda a: a + 0.1, state)
    gradients = jax.tree.leaves(jax.jit(jax.grad(output))(moved))
    assert all(not np.any(np.asarray(g)) for g in gradients)
