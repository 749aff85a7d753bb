"""Statistics of a layer by hand, metrics against other projects and against real models' loads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import MoeStats, RouterInput, moe_stats, normalised_entropy
from moejax.routing.metrics import coefficient_of_variation, figures, max_vio, utilisation
from tests.dispatch.plans import chosen, plan_with
from tests.oracle import case, check, load


def by_hand() -> MoeStats:
    """Four tokens, the last one padding; choices (0, 1) (0, 1) (0, 2); two slots; k-major."""
    routing = chosen(np.array([[0, 1], [0, 1], [0, 2], [3, 3]]), np.full((4, 2), 0.5), 3)
    scores_TE = jnp.asarray([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [2.0, 0.0, 2.0], [9.0, 9.0, 9.0]])
    routing = routing._replace(scores_TE=scores_TE)
    r = RouterInput(jnp.log(jnp.maximum(scores_TE, 1e-9)), jnp.asarray([True, True, True, False]))
    return moe_stats(r, routing, plan_with(routing, room=2))


def test_statistics_by_hand() -> None:
    # Expert 0 is wanted by t0, t1, t2 and has two slots: t2's first choice drops, its second fits.
    stats = by_hand()
    assert int(stats.tokens) == 3
    assert stats.load_E.tolist() == [3, 2, 1]
    assert stats.first_E.tolist() == [3, 0, 0]
    assert stats.kept_E.tolist() == [2, 2, 1]
    assert stats.dropped_K.tolist() == [1, 0]
    assert int(stats.left_behind) == 0
    # Scores over their sums: (.5 .25 .25), (1 0 0), (.5 0 .5).
    np.testing.assert_allclose(stats.prob_E, [2.0, 0.25, 0.75], rtol=1e-6)
    # Entropies 1.5 ln 2, 0, ln 2; logsumexp of the log scores: ln 1, ln 1, ln 4.
    assert stats.entropy == pytest.approx(2.5 * np.log(2), rel=1e-5)
    assert stats.z == pytest.approx(np.log(4) ** 2, rel=1e-5)


def test_left_behind_counts_real_tokens_that_no_expert_worked_on() -> None:
    # One slot: t0 has it, t1 and t2 get nothing, t3 is padding.
    routing = chosen(np.array([[0], [0], [0], [2]]), np.full((4, 1), 0.5), 2)
    r = RouterInput(jnp.zeros((4, 2)), jnp.asarray([True, True, True, False]))
    stats = moe_stats(r, routing, plan_with(routing, room=1))
    assert int(stats.left_behind) == 2 and stats.dropped_K.tolist() == [2]


def test_figures_by_hand() -> None:
    one = by_hand()
    idle = one._replace(load_E=jnp.asarray([0, 6, 0]), kept_E=jnp.asarray([0, 6, 0]))
    shown = figures(
        jax.tree.map(lambda *a: jnp.stack(a), one, idle._replace(dropped_K=jnp.zeros(2)))
    )
    assert shown["max_vio"] == pytest.approx((0.5 + 2.0) / 2)  # 3 / 2 - 1 and 6 / 2 - 1
    assert shown["dead"] == pytest.approx(2 / 6)
    assert shown["drop"] == pytest.approx(1 / 12)
    np.testing.assert_allclose(shown["drop_k"], [1 / 6, 0.0], rtol=1e-6)  # of 2 layers x 3 tokens
    np.testing.assert_allclose(shown["load_LE"], [[1 / 2, 1 / 3, 1 / 6], [0, 1, 0]], rtol=1e-6)
    np.testing.assert_allclose(shown["max_vio_L"], [0.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(shown["drop_L"], [1 / 6, 0.0], rtol=1e-6)
    entropy = np.log(2) / 2 + np.log(3) / 3 + np.log(6) / 6
    assert shown["load_entropy"] == pytest.approx(entropy / np.log(3) / 2, rel=1e-5)
    assert shown["router_entropy"] == pytest.approx(2.5 / 3 * np.log(2) / np.log(3), rel=1e-5)
    np.testing.assert_allclose(shown["load_entropy_L"], [entropy / np.log(3), 0.0], rtol=1e-5)
    np.testing.assert_allclose(shown["router_entropy_L"], [shown["router_entropy"]] * 2, rtol=1e-6)
    assert shown["left_behind"] == 0.0


def test_a_routers_own_numbers_are_shown_per_token() -> None:
    layers = [by_hand()._replace(own={"flips": n, "by_expert_E": jnp.ones(3)}) for n in (1, 3)]
    shown = figures(jax.tree.map(lambda *a: jnp.stack(a), *layers))
    assert shown["own"] == {"flips": pytest.approx(4 / 6)}  # of 2 layers x 3 tokens


def test_figures_of_a_batch_of_padding_are_finite_and_drop_nothing() -> None:
    zero = jax.tree.map(lambda a: jnp.zeros_like(a)[None], by_hand())
    shown = figures(zero)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(shown))
    assert shown["drop"] == 0.0 and shown["left_behind"] == 0.0


def test_figures_count_beyond_31_bits() -> None:
    # 60 layers of 64 M assignments each are 3.8e9.
    one = by_hand()
    large = one._replace(
        load_E=jnp.full(3, 2**26), kept_E=jnp.full(3, 2**25), tokens=jnp.int32(2**26)
    )
    shown = figures(jax.tree.map(lambda a: jnp.stack([a] * 60), large))
    assert shown["drop"] == pytest.approx(0.5)
    assert shown["drop_k"].tolist() == pytest.approx([2.0**-26, 0.0])


def test_one_expert_has_all() -> None:
    # n = (400, 0, 0, 0): max/mean - 1 = 3, std/mean = sqrt(3), entropy 0.
    load_E = jnp.asarray([400, 0, 0, 0])
    assert max_vio(load_E) == pytest.approx(3.0)
    assert coefficient_of_variation(load_E) == pytest.approx(np.sqrt(3))
    assert normalised_entropy(load_E) == pytest.approx(0.0)


def diversity(load_LE: jax.Array) -> np.ndarray:
    """exp(H) / E, other projects' way to say the entropy; 0 there where nobody has a load."""
    num_experts = load_LE.shape[-1]
    share = np.exp(np.asarray(normalised_entropy(load_LE)) * np.log(num_experts)) / num_experts
    return np.where(load_LE.sum(-1) > 0, share, 0.0)


@pytest.mark.parametrize(
    "name",
    [
        "metrics/automodel_uniform",
        "metrics/automodel_skewed",
        "metrics/automodel_zero_load_expert",
        "metrics/automodel_percentiles",
        "metrics/automodel_single_expert",
        "metrics/automodel_two_of_four",
        "metrics/automodel_all_zero",
        "metrics/automodel_two_layers",
    ],
)
def test_automodel(name: str) -> None:
    found = case(name)
    load_LE = jnp.asarray(found["inputs"]["load_LE"])
    want = found["expected"]
    # Quarters there are elements of the sorted list, n // 4 and 3 n // 4 of it.
    sorted_N = np.sort(np.ravel(utilisation(load_LE)))
    got = {
        "utilisation_min": sorted_N[0],
        "utilisation_p25": sorted_N[len(sorted_N) // 4],
        "utilisation_median": np.median(sorted_N),
        "utilisation_p75": sorted_N[3 * len(sorted_N) // 4],
        "utilisation_max": max_vio(load_LE).max() + 1,
        "dead_fraction": (load_LE == 0).mean(),
        "cv": coefficient_of_variation(load_LE).max(),
        "diversity": diversity(load_LE).mean(),
        "diversity_min": diversity(load_LE).min(),
        "diversity_mean": diversity(load_LE).mean(),
    }
    assert set(want) <= set(got)
    for key in want:
        check(found, key, got[key])
    check(found, "cv", coefficient_of_variation(load_LE), found["derived"]["cv_population_L"])


@pytest.mark.parametrize(
    "name", ["routing_counts/olmoe_routing_counts", "routing_counts/mixtral_routing_counts"]
)
@pytest.mark.parametrize(
    "domain", load("routing_counts")["cases"]["olmoe_routing_counts"]["expected"]
)
def test_loads_of_trained_models(name: str, domain: str) -> None:
    found = case(name)
    load_LE = jnp.asarray(found["inputs"]["counts"][domain])
    k, num_experts = found["inputs"]["K"], found["inputs"]["E"]
    want = {
        key: [row[key] for row in found["expected"][domain]] for key in found["expected"][domain][0]
    }
    vio_L = np.asarray(max_vio(load_LE))
    check(found, "max_violation", vio_L, want["max_violation"])
    check(found, "busiest", (vio_L + 1) * k / num_experts, want["busiest_share_of_tokens"])
    check(found, "busiest_expert", load_LE.argmax(-1), want["busiest_expert"])
    check(found, "cv", coefficient_of_variation(load_LE), want["cv_population"])
    check(found, "entropy", normalised_entropy(load_LE), want["entropy_normalised"])
    check(found, "diversity", diversity(load_LE), want["diversity"])
    check(found, "dead", (load_LE == 0).mean(-1), want["dead_fraction"])
