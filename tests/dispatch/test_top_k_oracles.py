"""Token choice under a capacity limit, as V-MoE, flaxformer, praxis, MaxText and sglang do it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import make_plan, route
from moejax.reference import plan_TE
from moejax.routing import RouterInput, load_balance
from moejax.routing.balance import BALANCE_LOSSES
from moejax.routing.metrics import moe_stats
from moejax.routing.token_choice import gshard_top2, topk
from tests.dispatch.plans import (
    chosen,
    dropped_rows,
    kept_rows,
    listed,
    plain_input,
    plan_with,
)
from tests.oracle import case, check


def check_plan(found, routing, plan, groups=1, block="", kept="kept") -> None:
    """Kept rows and dropped rows, the group column left out where the case has none."""
    tree = found["expected"][block] if block else {**found.get("derived", {}), **found["expected"]}
    num_tokens, num_experts = routing.scores_TE.shape
    rows = kept_rows(plan, num_tokens, num_experts, groups)
    gone = dropped_rows(routing, plan, groups)
    if groups == 1:
        rows, gone = [row[1:] for row in rows], [row[1:] for row in gone]
    want = sorted(tree[kept])
    assert [row[:-1] for row in rows] == [row[:-1] for row in want]
    check(found, "weights", [row[-1] for row in rows], [row[-1] for row in want])
    assert gone == sorted(tree["dropped"])


@pytest.mark.parametrize(
    ("name", "order"),
    [("top_k/vmoe_top2_C2_vanilla", "k_major"), ("top_k/vmoe_top2_C2_bpr", "bpr")],
)
def test_vmoe(name: str, order: str) -> None:
    found = case(name)
    gates_TE = jnp.asarray(found["inputs"]["gates_TE"])
    weight_TK, expert_TK = jax.lax.top_k(gates_TE, found["inputs"]["K"])
    routing = chosen(expert_TK, weight_TK, gates_TE.shape[1], order)
    check_plan(found, routing, plan_with(routing, found["inputs"]["C"]))


FLAXFORMER = {
    "top_k/ff_switch_mask_vanilla_G2S3E2C1": "k_major",
    "top_k/ff_switch_mask_bpr_G2S3E2C1": "bpr",
    "top_k/ff_top2_mask_bpr_G2S4E3C1": "bpr",
}


@pytest.mark.parametrize("block", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FLAXFORMER)
def test_flaxformer(name: str, block: str) -> None:
    found = case(name)
    given, k = found["inputs"], found["inputs"]["K"]
    groups, num_experts = given["G"], given["E"]
    if block == "fp32":  # our own router from the logits; bf16 feeds the printed probabilities
        probs_GTE = jax.nn.softmax(jnp.asarray(given["fp32"]["logits_GTE"]))
    else:
        probs_GTE = jnp.asarray(given["bf16"]["probs_GTE"])
    weight_GTK, expert_GTK = jax.lax.top_k(probs_GTE, k)
    routing = listed(
        [
            chosen(e, w, num_experts, FLAXFORMER[name])
            for e, w in zip(expert_GTK, weight_GTK, strict=True)
        ]
    )
    check_plan(found, routing, plan_with(routing, given["C"], groups), groups, block)
    # aux: counts over T, mean over groups; ours divides by K T, so theirs is K times ours.
    count_GE = jax.nn.one_hot(expert_GTK, num_experts).sum((1, 2))
    ours = np.mean([load_balance(c, p.mean(0)) for c, p in zip(count_GE, probs_GTE, strict=True)])
    check(found, f"{block}.aux", k * ours)
    if block == "fp32":
        check(
            found,
            "aux_balance1_mean_of_groups",
            ours,
            found["derived"]["aux_balance1_mean_of_groups"],
        )


@pytest.mark.parametrize("block", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FLAXFORMER)
def test_flaxformer_losses_from_our_own_router(name: str, block: str) -> None:
    found = case(name)
    given, k = found["inputs"], found["inputs"]["K"]
    logits_TE = jnp.asarray(given[block]["logits_GTE"]).reshape(-1, given["E"])
    r = RouterInput(logits_TE, jnp.ones(logits_TE.shape[0], bool))
    routing = route(lambda r: topk(r, k=k), r, given["G"], "sequence")
    stats = moe_stats(r, routing, make_plan(routing, None, given["G"]))
    check(found, f"{block}.z", BALANCE_LOSSES["router_z"](stats))
    if block == "fp32":
        pooled = found["derived"]["aux_balance1_pooled"]
        check(found, "aux_balance1_pooled", BALANCE_LOSSES["load_balance"](stats), pooled)


def test_flaxformer_switch_through_the_whole_path() -> None:
    found = case("top_k/ff_switch_mask_vanilla_G2S3E2C1")
    logits_TE = jnp.asarray(found["inputs"]["fp32"]["logits_GTE"]).reshape(6, 2)
    r = RouterInput(logits_TE, jnp.ones(6, bool))
    routing = route(lambda r: topk(r, k=1), r, 2, "sequence")
    # C = ceil(2/3 x 3 tokens / 2 experts) = 1 in each sequence.
    check_plan(found, routing, make_plan(routing, 2 / 3, 2), 2, "fp32")


def test_praxis_normalises_before_or_after_dropping() -> None:
    found = case("top_k/praxis_top2_gshard_C2")
    gates_TE = jnp.asarray(found["inputs"]["gates_TE"])
    r = plain_input(jnp.log(jnp.maximum(gates_TE, 1e-9)))
    routing = gshard_top2(r)
    plan = plan_with(routing, found["inputs"]["C"])
    check_plan(found, routing, plan, kept="kept_normalised_before_drop")
    weight_TE = plan_TE(plan, 4, 3)
    check(found, "normalised_before_drop.row_sums_T", weight_TE.sum(-1))
    # Ours is 'before'; dividing what was kept by its sum gives the other convention.
    after_TE = weight_TE / weight_TE.sum(-1, keepdims=True)
    check(found, "normalised_after_drop.row_sums_T", after_TE.sum(-1))
    want = [weight for *_, weight in found["derived"]["kept_normalised_after_drop"]]
    check(found, "after", after_TE[after_TE > 0], want)
    stats = moe_stats(r, routing, plan)
    check(found, "aux", BALANCE_LOSSES["load_balance_top1"](stats))
    check(found, "over_capacity_first", stats.dropped_K[0] / 4)
    check(found, "over_capacity_second", stats.dropped_K[1] / 4)


def test_maxtext_drops_by_sequence_in_token_order() -> None:
    found = case("top_k/maxtext_generate_masks")
    given = found["inputs"]
    experts, weights = np.asarray(given["experts_GTK"]), np.asarray(given["weights_GTK"])
    routing = listed(
        [chosen(e, w, given["E"], "token_major") for e, w in zip(experts, weights, strict=True)]
    )
    # Their factor 2 on ceil(S K / E) = 1: two slots a sequence, which is factor 2 here, too.
    plan = make_plan(routing, given["capacity_factor"], 4)
    assert plan.slots == 4 * given["C"]
    check_plan(found, routing, plan, 4)
    assert len(dropped_rows(routing, plan, 4)) == found["expected"]["n_dropped"]


def test_sglang_renormalises_three_scores() -> None:
    found = case("top_k/sgl_topk")
    scores_TE = jnp.asarray(found["inputs"]["scores_TE"])
    # softmax(log s) is s over its sum; the three that count are positive.
    routing = topk(plain_input(jnp.log(jnp.maximum(scores_TE, 1e-9))), k=3, renormalise=True)
    assert routing.expert_N.reshape(3, 2).T.tolist() == found["expected"]["experts_TK"]
    weight_TK = routing.weight_N.reshape(3, 2).T
    check(found, "weights_TK", weight_TK, found["derived"]["weights_TK"])
    check(found, "weight_sum_T", weight_TK.sum(-1))
