"""Judges of several arms, by hand on the known numbers of conftest; every status of each."""

import json
import math
from pathlib import Path

import pytest

from moejax.reporting import (
    Either,
    Quotient,
    Results,
    contrast,
    falling,
    load,
    sees_later,
    steadier,
    under,
)
from moejax.reporting.paired import f95


@pytest.fixture
def results(comparison: Path) -> Results:
    return load(comparison)


def set_bpb(out: Path, arm: str, *values: float) -> None:
    for seed, value in enumerate(values):
        path = out / arm / f"seed{seed}/summary.json"
        summary = json.loads(path.read_text())
        summary["eval"]["bpb"] = value
        path.write_text(json.dumps(summary))


def test_contrast_by_hand(results: Results) -> None:
    # dense 2.50 2.52 2.48, switch 2.40 2.43 2.37, loss_free 2.39 2.42 2.375: dense - 2 switch +
    # loss_free = .09, .08, .115: mean .095, s = .01803, h = 2.920 * .01803 / sqrt(3) = .0304.
    weights = {"dense": 1, "switch": -2, "loss_free": 1}
    verdict = contrast("eval.bpb", weights)(results)
    assert verdict.status == "held"
    assert (verdict.effect, verdict.half_width) == pytest.approx((0.095, 0.0304), abs=1e-4)
    assert "dense - 2 switch + loss_free" in verdict.text
    opposite = {arm: -weight for arm, weight in weights.items()}
    assert contrast("eval.bpb", opposite)(results).status == "not held"
    # switch - loss_free = .01, .01, -.005.
    assert contrast("eval.bpb", {"switch": 1, "loss_free": -1})(results).status == "inconclusive"
    assert contrast("eval.bpb", {"switch": 1, "absent": -1})(results).n == 0


def test_falling_by_hand(results: Results) -> None:
    # Each step clears .5 % of dense's mean, and loss_free - dense = -.11, -.10, -.105.
    assert falling("eval.bpb", "dense", "switch", "loss_free")(results).status == "held"
    up = falling("eval.bpb", "loss_free", "switch", "dense")(results)
    assert up.status == "not held"
    # A dip: expert_choice is .05 below dense, switch .05 below that; but topk after switch
    # is .01, -.01, .02: mean .0067, h = .0257 against the margin .0125.
    dip = falling("eval.bpb", "dense", "switch", "topk")(results)
    assert dip.status == "inconclusive"
    assert "topk - switch" in dip.text
    assert falling("eval.bpb", "dense", "switch", "topk", margin=0.02)(results).status == "held"


def test_falling_with_equal_ends_of_a_chain(comparison: Path) -> None:
    """Nothing dropped at two capacities is no rise."""
    set_bpb(comparison, "topk", 2.40, 2.43, 2.37)  # as switch
    assert falling("eval.bpb", "dense", "switch", "topk")(load(comparison)).status == "held"
    assert falling("eval.bpb", "switch", "topk")(load(comparison)).status == "inconclusive"


def test_under_by_hand(results: Results) -> None:
    # dense: mean 2.50, s = .02, h = 2.920 * .02 / sqrt(3) = .0337.
    assert under("eval.bpb", "dense", 2.54)(results).status == "held"
    assert under("eval.bpb", "dense", 2.51)(results).status == "inconclusive"
    assert under("eval.bpb", "dense", 2.46)(results).status == "not held"
    assert under("eval.max_vio_global", "expert_choice", 0.01)(results).status == "held"


def test_steadier_by_hand(comparison: Path) -> None:
    # sd of dense .02; of switch 1.0 here: a ratio of 50, more than sqrt(19) = 4.36.
    set_bpb(comparison, "switch", 2.0, 3.0, 4.0)
    results = load(comparison)
    verdict = steadier("eval.bpb", "dense", "switch")(results)
    assert verdict.status == "held"
    assert verdict.effect == pytest.approx(math.log(50))
    assert verdict.half_width == pytest.approx(math.log(4.3589), abs=1e-4)
    assert steadier("eval.bpb", "switch", "dense")(results).status == "not held"
    # .02 against .0225: nothing that chance does not do.
    assert steadier("eval.bpb", "dense", "loss_free")(results).status == "inconclusive"


def test_an_arm_that_diverged_is_not_steady(comparison: Path) -> None:
    set_bpb(comparison, "switch", 2.0, math.nan, 2.1)
    results = load(comparison)
    assert steadier("eval.bpb", "dense", "switch")(results).status == "held"
    assert steadier("eval.bpb", "switch", "dense")(results).status == "inconclusive"


def test_f95_against_the_t_table() -> None:
    # F(1, 1) at 5 % is t(1)^2 at 2.5 % on each side, 12.706^2; F(2, 2) = 1 / .05 - 1 exactly.
    assert f95(2) == pytest.approx(12.706**2, rel=1e-3)
    assert f95(3) == pytest.approx(19)
    assert f95(1) == math.inf and f95(30) == f95(10)


def test_sees_later(results: Results) -> None:
    assert sees_later(yes=("expert_choice",), no=("switch", "topk"))(results).status == "held"
    wrong = sees_later(yes=("switch",), no=("expert_choice", "topk"))(results)
    assert wrong.status == "not held"
    assert "otherwise: switch and expert_choice" in wrong.text
    absent = sees_later(no=("absent",))(results)
    assert absent.status == "inconclusive" and "absent" in absent.text


def test_quotient_of_two_metrics_of_a_run(results: Results) -> None:
    run = results.of("switch")[0]
    assert Quotient("eval.max_vio_global", "eval.drop")(run) == pytest.approx(0.60 / 0.04)
    assert Quotient("eval.drop", "eval.max_vio_global")(results.of("expert_choice")[0]) is None
    assert str(Quotient("a", "b")) == "a / b"


def test_either_of_two_metrics(results: Results) -> None:
    pooled = Either("eval.bpb_as_trained", "eval.bpb")
    assert pooled(results.of("expert_choice")[0]) == 2.30
    assert pooled(results.of("switch")[0]) == 2.40
