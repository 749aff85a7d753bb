"""Routers without one expert of each token, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis.ablation import CHOSEN, NOTHING, OTHER, Without, ablated, best
from moejax.routing import LayerSize, RouterInput, Routing, combine_TE, make_router

# Descending in each row: experts 0 1 2 3, and 3 2 1 0.
LOGITS_TE = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))


def routed(name: str, which: int, logits_TE: jax.Array, **options) -> Routing:
    """What an ablated router says."""
    router, tokens = make_router(name, options), logits_TE.shape[0]
    size = LayerSize(logits_TE.shape[1], 4, 8, jnp.ones(8))
    ids_T = jnp.arange(tokens)
    valid_T = jnp.ones(tokens, bool)
    state = Without(jnp.int32(which), router.init(size))
    r = RouterInput(logits_TE, valid_T, None, state, token_T=ids_T, next_T=ids_T)
    return ablated(router).route(r)


def weights(name: str, which: int, logits_TE: jax.Array = LOGITS_TE, **options) -> np.ndarray:
    """The dense weights [T, E] of an ablated router."""
    return np.asarray(combine_TE(routed(name, which, logits_TE, **options)))


@pytest.mark.parametrize(
    ("which", "chosen"),
    [
        (NOTHING, [[0, 1], [2, 3]]),
        (0, [[1, 2], [1, 2]]),  # the best one gone, the third follows
        (1, [[0, 2], [1, 3]]),
        (2, [[0, 1], [2, 3]]),  # nobody has a third choice
        (OTHER, [[0, 1], [2, 3]]),  # not asked for anyway
        (best(0), [[0, 1], [2, 3]]),
        (best(1), [[1, 2], [1, 2]]),
        (best(2), [[2, 3], [0, 1]]),
    ],
)
def test_who_works_without_one(which: int, chosen: list[list[int]]) -> None:
    found_TE = weights("topk", which, k=2, renormalise=True)
    assert [np.flatnonzero(row).tolist() for row in found_TE] == chosen
    np.testing.assert_allclose(found_TE.sum(-1), 1.0, rtol=1e-6)


def test_the_others_share_what_the_best_one_had() -> None:
    # Softmax over the rest: 0.3 / 0.6 and 0.2 / 0.6.
    np.testing.assert_allclose(weights("topk", 0, k=2)[0], [0, 1 / 2, 1 / 3, 0], rtol=1e-5)


def test_the_best_are_those_chosen_and_then_the_others_by_score() -> None:
    """The bias has chosen expert 3 for the first token, whose scores fall from 0 to 3."""
    router = make_router("loss_free", {"k": 2})

    def works(which: int) -> list[int]:
        state = Without(jnp.int32(which), jnp.asarray([0.0, 0.0, 0.0, 9.0]))
        r = RouterInput(LOGITS_TE[:1], jnp.ones(1, bool), None, state)
        return np.flatnonzero(combine_TE(ablated(router).route(r))[0]).tolist()

    assert works(NOTHING) == [0, 3]
    # Asked again, it insists on 3, which is taken out: one expert is left.
    assert [works(best(count)) for count in (1, 2, 3, 4)] == [[1, 3], [1], [2], []]
    assert works(1) == [0]


def test_a_random_choice_is_one_of_the_tokens_own() -> None:
    many_TE = jnp.tile(LOGITS_TE[:1], (400, 1))
    found_TE = weights("topk", CHOSEN, many_TE, k=2) > 0
    assert found_TE[:, 2].all() and (found_TE.sum(-1) == 2).all()
    assert 0.4 < found_TE[:, 0].mean() < 0.6  # each of the two is gone half of the time


def test_a_table_insists_and_loses_the_assignment() -> None:
    assert (weights("hash", NOTHING, k=1) > 0).sum() == 2
    assert routed("hash", 0, LOGITS_TE, k=1).expert_N.tolist() == [4, 4]  # nowhere


def test_experts_that_choose_and_gates_that_open_do_without_too() -> None:
    whole_TE, found_TE = (weights("remoe", which, LOGITS_TE + 1.5) > 0 for which in (NOTHING, 0))
    assert (whole_TE.sum(-1) - found_TE.sum(-1)).tolist() == [1, 1]
    assert not found_TE[0, 0] and not found_TE[1, 3]
    # Experts take one token each: 0 and 1 the first, 2 and 3 the second; both without their best.
    whole_TE, found_TE = (weights("expert_choice", which, k=2) > 0 for which in (NOTHING, 0))
    assert whole_TE.sum(0).tolist() == [1, 1, 1, 1] and (whole_TE != found_TE).any()
