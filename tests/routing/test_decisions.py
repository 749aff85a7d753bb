"""A routing by token: which experts, what dropped, how sure the router was. By hand."""

import math

import jax.numpy as jnp
import numpy as np

from moejax.routing import RouterInput, Routing, decisions, make_router

# Three tokens, three experts; listed expert by expert. Token 0 goes to experts 0 and 2, token 1
# nowhere (its choice was refused; one is for the gradient alone), token 2 to expert 1, which is
# full.
SCORES_TE = jnp.asarray([[0.5, 0.125, 0.375], [0.25, 0.25, 0.0], [0.0, 0.25, 0.75]])
ROUTING = Routing(
    token_N=jnp.asarray([0, 2, 0, 1, 1]),
    expert_N=jnp.asarray([0, 1, 2, 3, 2]),
    weight_N=jnp.asarray([0.25, 1.0, 0.5, 0.0, 0.125]),
    choice_N=jnp.asarray([0, 0, 1, 0, -1]),
    scores_TE=SCORES_TE,
)
KEPT_N = jnp.asarray([True, False, True, False, True])


def test_the_experts_that_each_token_chose() -> None:
    got = decisions(ROUTING, KEPT_N, 2)
    assert got.expert_TR.tolist() == [[0, 2], [3, 3], [1, 3]]
    assert got.weight_TR.tolist() == [[0.25, 0.5], [0.0, 0.0], [1.0, 0.0]]
    assert got.dropped_TR.tolist() == [[False, False], [False, False], [True, False]]
    assert got.recorded.expert_TR is got.expert_TR and got.recorded.weight_TR is got.weight_TR


def test_where_tokens_do_not_choose_the_heaviest_stands_first() -> None:
    got = decisions(ROUTING, KEPT_N)
    assert got.expert_TR.tolist() == [[2, 0, 3], [3, 3, 3], [1, 3, 3]]
    assert got.weight_TR.tolist() == [[0.5, 0.25, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert got.dropped_TR.tolist() == [[False] * 3, [False] * 3, [True, False, False]]


def test_entropy_and_margin() -> None:
    got = decisions(ROUTING, KEPT_N)
    # 4/8, 1/8, 3/8; two halves of a sum of 1/2; 1/4 and 3/4.
    first = 0.5 * math.log(2) + 0.125 * math.log(8) - 0.375 * math.log(0.375)
    last = 0.25 * math.log(4) - 0.75 * math.log(0.75)
    np.testing.assert_allclose(got.entropy_T, [first, math.log(2), last], rtol=1e-6)
    # min(.5, .375) - .125; nothing chosen; .25 - .75: its score alone would not choose so.
    np.testing.assert_allclose(got.margin_T, [0.25, np.nan, -0.5])


def test_where_all_are_chosen_there_is_no_margin() -> None:
    routing = make_router("topk", {"k": 3}).route(
        RouterInput(jnp.log(SCORES_TE), jnp.ones(3, bool))
    )
    assert np.all(np.isnan(decisions(routing, jnp.ones(9, bool)).margin_T))


def test_experts_that_chose_a_token_stand_by_falling_weight() -> None:
    logits_TE = jnp.log(jnp.asarray([[0.1, 0.2, 0.7], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]]))
    routing = make_router("expert_choice", {"k": 3}).route(
        RouterInput(logits_TE, jnp.ones(3, bool))
    )
    got = decisions(routing, jnp.ones(9, bool))
    assert got.expert_TR.tolist() == [[2, 1, 0], [1, 2, 0], [2, 0, 1]]
