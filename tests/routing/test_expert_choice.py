"""Expert choice by hand, and as V-MoE and flaxformer do it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import make_plan, route
from moejax.routing import RouterInput, combine_TE
from moejax.routing.balance import router_z
from moejax.routing.expert_choice import expert_choice
from moejax.routing.metrics import moe_stats
from tests.dispatch.plans import kept_rows, plain_input
from tests.oracle import case, check


def test_each_expert_takes_its_best_tokens_best_first() -> None:
    # C = 1 x 4 / 2. Expert 0 (.9 .6 .3 .2) takes t0, t1; expert 1 (.1 .4 .7 .8) takes t3, t2.
    probs_TE = jnp.asarray([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    routing = expert_choice(plain_input(jnp.log(probs_TE)), k=1)
    assert routing.expert_N.tolist() == [0, 0, 1, 1]
    assert routing.token_N.tolist() == [0, 1, 3, 2]
    np.testing.assert_allclose(routing.weight_N, [0.9, 0.6, 0.8, 0.7], rtol=1e-6)


@pytest.mark.parametrize(("tokens", "k", "room"), [(8, 2, 4), (6, 1, 2), (2, 2, 1), (3, 4, 3)])
def test_load_is_exactly_the_capacity(tokens: int, k: int, room: int) -> None:
    # C = ceil(k T / 4): 4, 1.5 -> 2, 1, 3.
    logits_TE = jnp.asarray(np.random.default_rng(0).normal(size=(tokens, 4)), jnp.float32)
    routing = expert_choice(plain_input(logits_TE), k=k)
    assert jnp.bincount(routing.expert_N, length=4).tolist() == [room] * 4


def test_too_few_tokens_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"2 x 3 / 8 < 1; each group needs at least 4 tokens"):
        expert_choice(plain_input(jnp.zeros((3, 8))), k=2)
    with pytest.raises(ValueError, match="k=5 is more than the 4 experts"):
        expert_choice(plain_input(jnp.zeros((8, 4))), k=5)


def test_fewer_real_tokens_than_slots_leave_slots_empty() -> None:
    # C = 2 x 4 / 2 = 4 slots, one real token: each expert takes it once, and nothing else.
    r = plain_input(jnp.zeros((4, 2)))._replace(valid_T=jnp.asarray([False, True, False, False]))
    dense_TE = combine_TE(expert_choice(r, k=2))
    np.testing.assert_allclose(dense_TE, [[0, 0], [0.5, 0.5], [0, 0], [0, 0]], rtol=1e-6)


@pytest.fixture
def scores_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case prints probabilities that no logits give exactly: they stand in for the softmax."""
    monkeypatch.setattr(jax.nn, "softmax", lambda logits_TE: logits_TE)


@pytest.mark.usefixtures("scores_as_given")
def test_vmoe() -> None:
    found = case("expert_choice/vmoe_expert_choice_C2")
    routing = expert_choice(plain_input(jnp.asarray(found["inputs"]["gates_TE"])), k=2)  # 2 x 3 / 3
    rows = [row[1:] for row in kept_rows(make_plan(routing, None), 3, 3)]
    assert [row[:3] for row in rows] == [row[:3] for row in found["expected"]["kept"]]
    check(found, "weights", [row[3] for row in rows], [row[3] for row in found["expected"]["kept"]])
    per_token_T = np.asarray(combine_TE(routing) > 0).sum(1)
    check(found, "coverage_at_least", [(per_token_T >= n).mean() for n in (1, 2, 3)])
    check(found, "experts_per_token_min", per_token_T.min())
    check(found, "experts_per_token_max", per_token_T.max())
    check(found, "min_selected_gate", routing.weight_N.min())
    check(found, "max_selected_gate", routing.weight_N.max())


def check_flaxformer(found, block: str, r: RouterInput) -> None:
    routing = route(lambda r: expert_choice(r, k=1), r, 2, "sequence")  # C = 1 x 4 / 2
    rows = kept_rows(make_plan(routing, None, 2), 8, 2, groups=2)
    want = found["expected"][block]["kept"]
    # A plan without a capacity has as many slots as there are tokens: the queue is the same.
    assert [row[:4] for row in rows] == [row[:4] for row in want]
    check(found, "weights", [row[4] for row in rows], [row[4] for row in want])


FLAXFORMER = "expert_choice/ff_expert_choice_G2S4E2C2"


def test_flaxformer_in_float32() -> None:
    found = case(FLAXFORMER)
    r = plain_input(jnp.asarray(found["inputs"]["fp32"]["logits_GTE"]).reshape(8, 2))
    check_flaxformer(found, "fp32", r)


@pytest.mark.usefixtures("scores_as_given")
def test_flaxformer_ties_of_bfloat16_go_to_the_first_token() -> None:
    found = case(FLAXFORMER)
    r = plain_input(jnp.asarray(found["inputs"]["bf16"]["probs_GTE"]).reshape(8, 2))
    check_flaxformer(found, "bf16", r)


@pytest.mark.parametrize("block", ["fp32", "bf16"])
def test_flaxformer_z(block: str) -> None:
    found = case(FLAXFORMER)
    r = plain_input(jnp.asarray(found["inputs"][block]["logits_GTE"]).reshape(8, 2))
    routing = expert_choice(r, k=1)
    check(found, f"{block}.z", router_z(moe_stats(r, routing, make_plan(routing, None))))
