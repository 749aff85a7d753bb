"""Tables from ids to experts: random, balanced, and the one that looks ahead and is found out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.causality import dependence
from moejax.moe import MoeOptions
from moejax.routing import LayerSize, RouterInput, combine_TE, make_router
from moejax.routing.hash import balanced_table, hash_router, make_table
from tests.dispatch.plans import plain_input


def test_balanced_table_by_hand() -> None:
    # 5 to expert 0 (5), 4 to 1 (4), 3 to 1 (7), 3 to 0 (8), 1 to 1 (8): masses 8 and 8.
    count_V = jnp.asarray([3.0, 5.0, 1.0, 4.0, 3.0])
    table_V = balanced_table(count_V, 2)
    assert table_V.tolist() == [1, 0, 1, 1, 0]
    assert np.bincount(table_V, weights=count_V).tolist() == [8.0, 8.0]


def test_balanced_table_of_a_skewed_vocabulary() -> None:
    # Zipf counts: a twelfth of the text is one id, less than a quarter. Order of ids is no help.
    count_V = np.random.default_rng(0).permutation(1e5 / (1 + np.arange(3000)))
    size = LayerSize(4, vocab_size=3000, count_V=jnp.asarray(count_V))
    init = jax.jit(
        lambda count_V: make_router("hash", {"table": "balanced"}).init(
            size._replace(count_V=count_V)
        )
    )
    mass_E = np.bincount(init(size.count_V), weights=count_V)
    assert mass_E.max() / mass_E.mean() < 1.001
    random_E = np.bincount(make_table(size), weights=count_V)
    assert random_E.max() / random_E.mean() > 1.02


def test_random_table_is_fixed_by_its_seed_and_even_over_ids() -> None:
    size = LayerSize(4, vocab_size=4000)
    table_V = make_table(size)
    assert table_V.dtype == jnp.int32
    # 4,000 / 4 = 1,000 ids each; 4 sd = 110.
    assert np.abs(np.bincount(table_V, minlength=4) - 1000).max() < 110
    np.testing.assert_array_equal(make_table(size), table_V)
    assert np.mean(np.asarray(make_table(size, table_seed=1) == table_V)) < 0.3
    even = np.bincount(make_table(size, table="balanced"))  # without counts: all ids alike
    assert even.tolist() == [1000] * 4


TABLE_V = jnp.asarray([2, 0, 1, 2])
ID_T, NEXT_T = jnp.asarray([0, 3, 1, 0]), jnp.asarray([3, 1, 0, 0])
R = plain_input(
    jnp.asarray(np.random.default_rng(0).normal(size=(4, 3))),
    state=TABLE_V,
    token_T=ID_T,
    next_T=NEXT_T,
)


def test_expert_is_the_tables_and_weighs_one() -> None:
    routing = hash_router(R._replace(valid_T=jnp.asarray([True, True, True, False])))
    want_TE = [[0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert combine_TE(routing).tolist() == want_TE
    assert routing.scores_TE.tolist() == [*want_TE[:3], [0, 0, 1]]


def test_looking_ahead_reads_the_next_id() -> None:
    assert hash_router(R, look="next").expert_N.tolist() == [2, 0, 2, 2]


@pytest.mark.parametrize(("look", "leaks"), [("token", False), ("next", True)])
def test_the_leak_is_found(look: str, leaks: bool) -> None:
    found = dependence(MoeOptions(make_router("hash", {"look": look})), 4)
    assert found.later is leaks and found.causal is not leaks
    assert not found.others


def test_nothing_is_learned() -> None:
    def total(logits_TE: jax.Array) -> jax.Array:
        routing = hash_router(R._replace(logits_TE=logits_TE))
        return routing.weight_N.sum() + routing.scores_TE[0, 0]

    assert not np.any(jax.grad(total)(R.logits_TE))
    assert make_router("hash").update(TABLE_V, None) is TABLE_V


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"k": 2}, {}, "hash routes each token to 1 expert, got k=2"),
        ({"look": "back"}, {}, "unknown look='back': use 'token' or 'next'"),
        ({}, {"token_T": None}, "hash needs token ids"),
        ({}, {"state": None}, "and its table"),
    ],
)
def test_what_hash_cannot_do_is_refused(options, changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hash_router(R._replace(**changes), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "sorted"}, "unknown table='sorted': use 'random' or 'balanced'"),
        ({}, "hash needs the vocabulary's size, got vocab_size=0"),
    ],
)
def test_a_table_that_cannot_be_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router("hash", options).init(LayerSize(4))


def test_the_table_may_be_the_users() -> None:
    r = RouterInput(
        jnp.zeros((2, 2)), jnp.ones(2, bool), state=jnp.asarray([1, 1]), token_T=ID_T[:1]
    )
    assert hash_router(r._replace(token_T=jnp.asarray([0, 1]))).expert_N.tolist() == [1, 1]
