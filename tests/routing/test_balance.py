"""Balance losses by hand, at balance, and what each other project's loss is in terms of ours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import make_plan
from moejax.routing import MoeStats, RouterInput, combine_TE, load_balance, moe_stats
from moejax.routing.balance import (
    BALANCE_LOSSES,
    all_choices,
    balance_losses,
    first_choices,
    router_z,
)
from moejax.routing.token_choice import loss_free, topk
from tests.dispatch.plans import plain_input
from tests.oracle import case, check


@functools.partial(jax.jit, static_argnums=(0, 2))
def stats_of(route, logits_TE, k: int, valid_T=None) -> MoeStats:
    """The statistics of one router without a capacity."""
    r = plain_input(logits_TE)
    r = r if valid_T is None else r._replace(valid_T=valid_T)
    routing = route(r, k=k)
    return moe_stats(r, routing, make_plan(routing, None))


def layers(route=topk) -> list[MoeStats]:
    logits_LTE = case("loss_definitions/z_loss")["inputs"]["logits_LTE"]
    return [stats_of(route, jnp.asarray(logits_TE), 2) for logits_TE in logits_LTE]


def test_load_balance_by_hand() -> None:
    # f = (3, 1)/4, P = (.6, .4): 2 (.45 + .1) = 1.1. Counts may be scaled: f is their share.
    prob_E = jnp.asarray([0.6, 0.4])
    assert load_balance(jnp.asarray([3, 1]), prob_E) == pytest.approx(1.1)
    assert load_balance(jnp.asarray([30, 10]), prob_E) == pytest.approx(1.1)
    assert load_balance(jnp.asarray([0, 0]), prob_E) == 0.0  # a batch of padding


def test_losses_at_balance() -> None:
    # Uniform probabilities, every expert chosen as often: both are 1; z = (ln 4)^2.
    logits_TE = jnp.zeros((8, 4))
    uniform = stats_of(topk, logits_TE, 4)
    assert all_choices(uniform) == pytest.approx(1.0)
    assert router_z(uniform) == pytest.approx(np.log(4) ** 2)
    # Ties send every first choice to expert 0: f1 = (1, 0, 0, 0), P = 1/4 each: 4 x 1/4 = 1.
    assert first_choices(uniform) == pytest.approx(1.0)


def test_first_choices_and_all_choices_by_hand() -> None:
    # First choices 3, 1; P = (.65, .35): 2 (.75 x .65 + .25 x .35) = 1.15.
    # With K = 2 of 2 experts every count is 4: 2 (.325 + .175) = 1.
    probs_TE = jnp.asarray([[0.6, 0.4], [0.8, 0.2], [0.9, 0.1], [0.3, 0.7]])
    stats = stats_of(topk, jnp.log(probs_TE), 2)
    assert first_choices(stats) == pytest.approx(1.15)
    assert all_choices(stats) == pytest.approx(1.0)


def test_padding_adds_nothing_to_any_loss() -> None:
    # One real token, of logits (0, 0): z = (ln 2)^2 over one token, not three.
    logits_TE = jnp.asarray([[0.0, 0.0], [3.0, -1.0], [5.0, 5.0]])
    stats = stats_of(topk, logits_TE, 2, jnp.asarray([True, False, False]))
    assert router_z(stats) == pytest.approx(np.log(2) ** 2)
    assert all_choices(stats) == pytest.approx(1.0)
    empty = stats_of(topk, logits_TE, 2, jnp.zeros(3, bool))
    assert [float(loss(empty)) for loss in (all_choices, first_choices, router_z)] == [0.0] * 3


def test_gradient_flows_through_probabilities_and_not_through_counts() -> None:
    # loss = E sum_e f_e P_e: d / d P_e = E f_e, d / d counts = 0.
    count_E, prob_E = jnp.asarray([3.0, 1.0]), jnp.asarray([0.6, 0.4])
    by_count_E, by_prob_E = jax.grad(load_balance, argnums=(0, 1))(count_E, prob_E)
    assert by_count_E.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(by_prob_E, [1.5, 0.5], rtol=1e-6)


def test_losses_push_down_the_busiest_expert_and_large_logits() -> None:
    logits_TE = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)
    logits_TE = logits_TE.at[:, 2].add(2.0)
    for name in ("load_balance", "load_balance_top1"):
        gradient_TE = jax.grad(lambda a, name=name: BALANCE_LOSSES[name](stats_of(topk, a, 2)))(
            logits_TE
        )
        assert gradient_TE.sum(0).argmax() == 2 and gradient_TE[:, 2].sum() > 0.01
    # d mean(lse^2) / d logits = 2 lse p / T.
    gradient_TE = jax.grad(lambda a: router_z(stats_of(topk, a, 2)))(logits_TE)
    lse_T = jax.nn.logsumexp(logits_TE, axis=-1, keepdims=True)
    np.testing.assert_allclose(gradient_TE, 2 * lse_T * jax.nn.softmax(logits_TE) / 16, rtol=1e-4)


def test_scope_is_the_whole_batch() -> None:
    # Two microbatches, each all on its own expert: 2 each (E = 2), 1 together.
    sharp = jnp.asarray([[50.0, 0.0]] * 3)
    halves = [stats_of(topk, logits_TE, 1) for logits_TE in (sharp, sharp[:, ::-1])]
    assert [float(all_choices(half)) for half in halves] == pytest.approx([2.0, 2.0])
    assert all_choices(jax.tree.map(jnp.add, *halves)) == pytest.approx(1.0)


def test_balance_losses_are_means_over_layers_of_what_has_a_weight() -> None:
    per_layer = layers()
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *per_layer)
    losses = balance_losses(
        stacked, {"load_balance": 0.01, "load_balance_top1": 0.0, "router_z": 1e-3}
    )
    assert set(losses) == {"load_balance", "router_z"}
    want = np.mean([all_choices(stats) for stats in per_layer])
    assert losses["load_balance"] == pytest.approx(want)


# Other projects' losses, each as a factor on ours or another use of it.

K, E, WORKERS = 2, 4, 2


@pytest.mark.parametrize(
    ("name", "ours", "factor"),
    [
        ("loss_definitions/switch_top1", first_choices, 1),
        ("loss_definitions/topk_normalised", all_choices, 1),
        ("loss_definitions/topk_unnormalised", all_choices, K),  # counts over T, not K T
        (
            "loss_definitions/mean_without_E2",
            first_choices,
            1 / E**2,
        ),  # a mean, not E times the sum
        ("loss_definitions/local_expert_scaling", first_choices, 1 / WORKERS**2),
        ("loss_definitions/z_loss", router_z, 1),
    ],
)
def test_definitions_by_layer(name: str, ours, factor: float) -> None:
    check(case(name), "per_layer_L", [factor * ours(stats) for stats in layers()])


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("loss_definitions/topk_unnormalised_layers_mean", K),
        ("loss_definitions/topk_normalised_layers_mean", 1),
    ],
)
def test_definitions_as_means_over_layers(name: str, factor: float) -> None:
    check(case(name), "all_layers", factor * np.mean([all_choices(stats) for stats in layers()]))


def test_layers_concatenated_is_our_loss_of_the_summed_statistics() -> None:
    found = case("loss_definitions/topk_unnormalised_layers_concatenated")
    check(found, "all_layers", K * all_choices(jax.tree.map(jnp.add, *layers())))


def test_sigmoid_probabilities_are_divided_by_their_sum() -> None:
    found = case("loss_definitions/sigmoid_normalised")
    check(found, "per_layer_L", [all_choices(stats) for stats in layers(loss_free)])


def test_probabilities_over_the_chosen_only() -> None:
    found = case("loss_definitions/selected_softmax")
    got = []
    for logits_TE in found["inputs"]["logits_LTE"]:
        weight_TE = combine_TE(topk(plain_input(jnp.asarray(logits_TE)), k=2, renormalise=True))
        got.append(K * load_balance((weight_TE > 0).sum(0), weight_TE.mean(0)))
    check(found, "per_layer_L", got)


def test_per_sequence_is_the_mean_over_the_halves() -> None:
    found = case("loss_definitions/per_sequence")
    logits_BSE = jnp.asarray(found["inputs"]["logits_LTE"][0]).reshape(2, 6, 4)
    check(found, "layer0", np.mean([all_choices(stats_of(topk, a, 2)) for a in logits_BSE]))


def one_hot_counts(experts, num_experts: int) -> np.ndarray:
    return np.bincount(np.asarray(experts).reshape(-1), minlength=num_experts)


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("balance_losses/flaxformer_load_balancing_loss", "experts_TK"),
        ("balance_losses/hf_switch_load_balancing_loss", "experts_T"),
    ],
)
def test_probabilities_as_given(name: str, experts: str) -> None:
    found = case(name)
    count_E = one_hot_counts(found["inputs"][experts], 2)
    prob_TE = jnp.asarray(found["inputs"]["probs_TE"])
    check(found, "loss", load_balance(jnp.asarray(count_E), prob_TE.mean(0)))


def test_gshard_loss_of_vmoe() -> None:
    found = case("balance_losses/vmoe_losses")
    gates_TE = np.asarray(found["inputs"]["gates_TE"])
    count_E = one_hot_counts(gates_TE.argmax(-1), 3)
    check(found, "gshard", load_balance(jnp.asarray(count_E), jnp.asarray(gates_TE.mean(0))))


def test_z_loss_of_huggingface() -> None:
    found = case("balance_losses/hf_switch_router_z_loss")
    logits_TE = jnp.asarray(found["inputs"]["logits_GTE"]).reshape(-1, 4)
    check(found, "loss", router_z(stats_of(topk, logits_TE, 1)))


def test_router_of_huggingface() -> None:
    found = case("balance_losses/hf_switch_router_forward")
    x_GTD, w_DE = (jnp.asarray(found["inputs"][key]) for key in ("x_GTD", "w_DE"))
    per_group = [stats_of(topk, x_TD @ w_DE, 1) for x_TD in x_GTD]
    check(found, "aux", np.mean([first_choices(stats) for stats in per_group]))
    check(found, "z", np.mean([router_z(stats) for stats in per_group]))
    experts = [topk(RouterInput(x_TD @ w_DE, jnp.ones(3, bool)), k=1).expert_N for x_TD in x_GTD]
    check(found, "experts_GT", experts, found["derived"]["experts_GT"])


def test_value_of_every_project_at_perfect_balance() -> None:
    found = case("balance_losses/aux_scale_at_perfect_balance")
    given = found["inputs"]
    prob_E = jnp.asarray(given["probs_TE"]).mean(0)
    count_E = one_hot_counts(given["experts_TK"], given["E"])
    first_E = one_hot_counts(np.asarray(given["experts_TK"])[:, 0], given["E"])
    ours, ours_top1 = (load_balance(jnp.asarray(c), prob_E) for c in (count_E, first_E))
    k, tokens = given["K"], given["T"]
    # Per project: which of our two losses, and what its formula multiplies it by.
    factors = {
        "mesh_tensorflow": ours_top1,
        "praxis": ours_top1,
        "vmoe_gshard": ours_top1,
        "flaxformer": k * ours,  # counts over T
        "axlearn_topk": ours,
        "transformer_engine": ours,
        "simply": ours,
        "maxtext": k * ours,
        "marin_grug": k * ours,
        "levanter": ours / k,
        "easydel_STANDARD": tokens * ours,  # raw counts: K T f, over K
        "easydel_SWITCH": k * ours,
    }
    assert set(factors) == set(found["expected"]["value"])
    for project, value in factors.items():
        check(found, f"value.{project}", value)
