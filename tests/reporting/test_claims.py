"""Verdicts: the arithmetic by hand, every status of every judge, and what cannot be judged."""

import json
import math
from pathlib import Path

import pytest

from moejax.reporting import (
    Claim,
    Difference,
    Results,
    StepsTo,
    Window,
    all_of,
    at_most,
    less,
    load,
    over,
    positive,
    ratio_at_least,
    similar,
    sooner,
)


@pytest.fixture
def results(comparison: Path) -> Results:
    return load(comparison)


def edit_eval(out: Path, run: str, **values: float) -> None:
    path = out / run / "summary.json"
    summary = json.loads(path.read_text())
    summary["eval"].update(values)
    path.write_text(json.dumps(summary))


def test_less_by_hand(results: Results) -> None:
    # switch - dense at seeds 0, 1, 2: -.10, -.09, -.11. d = -.10, s = .01,
    # h = 2.920 * .01 / sqrt(3) = .01686; d + h = -.083 < 0.
    verdict = less("eval.bpb", "switch", "dense")(results)
    assert verdict.status == "held"
    assert (verdict.effect, verdict.half_width) == pytest.approx((-0.10, 0.016859), abs=1e-6)
    assert (verdict.n, verdict.margin) == (3, 0)
    assert less("eval.bpb", "dense", "switch")(results).status == "not held"


def test_less_within_the_noise_is_inconclusive(results: Results) -> None:
    # loss_free - switch: -.01, -.01, +.005. d = -.005, s = .00866, h = .0146 > |d|.
    verdict = less("eval.bpb", "loss_free", "switch")(results)
    assert verdict.status == "inconclusive"
    assert verdict.half_width == pytest.approx(0.0146, abs=1e-4)


def test_at_most_by_hand(results: Results) -> None:
    # The same d + h = .0096; margin .5 % of switch's mean 2.40 = .012.
    verdict = at_most("eval.bpb", "loss_free", "switch")(results)
    assert verdict.status == "held"
    assert verdict.margin == pytest.approx(0.012)
    # d + h = .0096 is not below .1 % = .0024, nor is d - h = -.0196 above it.
    tight = at_most("eval.bpb", "loss_free", "switch", margin=0.001)(results)
    assert tight.status == "inconclusive"
    # expert_choice - switch: .05, .03, .07: d = .05, s = .02, h = .0337, d - h = .016 > .012.
    assert at_most("eval.bpb", "expert_choice", "switch")(results).status == "not held"


def test_similar_by_hand(results: Results) -> None:
    # |d| + h = .005 + .0146 = .0196: above .5 % = .012, below 1 % = .024.
    assert similar("eval.bpb", "loss_free", "switch")(results).status == "inconclusive"
    assert similar("eval.bpb", "loss_free", "switch", margin=0.01)(results).status == "held"
    assert similar("eval.bpb", "switch", "dense")(results).status == "not held"
    assert similar("eval.bpb", "switch", "dense")(results).effect == pytest.approx(-0.10)


def test_ratio_by_hand(comparison: Path) -> None:
    # switch / loss_free: .6/.1, .6/.1, .6/.05 = 6, 6, 12: logs 1.7918, 1.7918, 2.4849;
    # mean 2.0228 (a ratio of 7.56), s = .4002, h = 2.920 * .4002 / sqrt(3) = .6747.
    edit_eval(comparison, "loss_free/seed2", max_vio_global=0.05)
    results = load(comparison)
    metric = "eval.max_vio_global"
    verdict = ratio_at_least(metric, "switch", "loss_free", 3)(results)
    assert verdict.status == "held"  # exp(2.0228 - .6747) = 3.85 >= 3
    assert verdict.effect == pytest.approx(2.0228, abs=1e-4)
    assert verdict.half_width == pytest.approx(0.6747, abs=1e-4)
    assert verdict.margin == pytest.approx(math.log(3))
    assert ratio_at_least(metric, "switch", "loss_free", 5)(results).status == "inconclusive"
    assert ratio_at_least(metric, "switch", "loss_free", 20)(results).status == "not held"


def test_ratio_is_clipped_at_the_floor(results: Results) -> None:
    # expert_choice has MaxVio 0; 65,536 tokens over 8 experts, K = 1: floor 1.4236 * sqrt(8 * 7 /
    # (7 * 65536)) = .01573; .6 / .01573 = 38.15.
    judge = ratio_at_least(
        "eval.max_vio_global", "switch", "expert_choice", 30, floor="eval.max_vio_floor"
    )
    verdict = judge(results)
    assert verdict.status == "held"
    assert math.exp(verdict.effect) == pytest.approx(38.15, abs=0.01)
    assert "lower bound" in verdict.text


def test_ratio_against_an_arm_at_its_floor_cannot_fail(results: Results) -> None:
    # .6 / .016 = 37.5 < 50, but expert_choice may be below what this many tokens can show.
    judge = ratio_at_least("eval.max_vio_global", "switch", "expert_choice", 50, floor=0.016)
    assert judge(results).status == "inconclusive"


def test_ratio_with_zero_asks_for_a_floor(results: Results) -> None:
    verdict = ratio_at_least("eval.max_vio_global", "switch", "expert_choice", 3)(results)
    assert verdict.status == "inconclusive"
    assert "floor" in verdict.text


def test_positive_by_hand(results: Results) -> None:
    # leak = .15, .14, .16: mean .15, h = .01686.
    verdict = positive("eval.leak", "expert_choice")(results)
    assert verdict.status == "held"
    assert verdict.effect == pytest.approx(0.15)
    falling = positive(Difference("eval.bpb_as_trained", "eval.bpb"), "expert_choice")
    assert falling(results).status == "not held"
    found = [over("eval.leak", "expert_choice", bound)(results) for bound in (0.13, 0.14, 0.17)]
    assert [v.status for v in found] == ["held", "inconclusive", "not held"]
    assert "must be > 0.13" in found[0].text


def test_difference_of_two_metrics_of_a_run(results: Results) -> None:
    second = Difference("train.drop_k.1", "train.drop_k.0")
    verdict = positive(second, "topk")(results)
    assert verdict.effect == pytest.approx(0.04)
    assert "train.drop_k.1 - train.drop_k.0" in verdict.text


def test_window_is_a_mean_of_training_records(results: Results) -> None:
    run = results.of("switch")[0]
    early = [r["max_vio"] for r in run.train if r["step"] <= 12]
    assert Window("max_vio", 0, 0.2)(run) == pytest.approx(sum(early) / 12)
    assert Window("drop_k.1", 0, 1)(results.of("topk")[0]) == pytest.approx(0.05)
    assert Window("no_such_field", 0, 1)(run) is None
    assert less(Window("max_vio", 0.8, 1), "loss_free", "switch")(results).status == "held"


def test_steps_to_interpolates(results: Results) -> None:
    run = results.of("switch")[0]
    a, b = run.evals[2]["bpb"], run.evals[3]["bpb"]  # steps 30 and 40
    assert StepsTo((a + b) / 2)(run) == pytest.approx(35)
    assert math.isnan(StepsTo(0.1)(run) or 0.0)
    assert StepsTo(99.0)(run) == 10


def test_sooner(results: Results) -> None:
    assert sooner("switch", "dense", target="dense")(results).status == "held"
    # dense never reaches switch's loss, switch does: not held.
    assert sooner("dense", "switch", target="switch")(results).status == "not held"


def test_all_of_takes_the_weakest(results: Results) -> None:
    yes, no = less("eval.bpb", "switch", "dense"), less("eval.bpb", "dense", "switch")
    open_ = less("eval.bpb", "loss_free", "switch")
    assert all_of(yes, yes)(results).status == "held"
    assert all_of(yes, open_)(results).status == "inconclusive"
    assert all_of(open_, no, yes)(results).status == "not held"
    assert all_of(open_, no)(results).effect == pytest.approx(0.10)


@pytest.mark.parametrize("judge", [less, at_most, similar])
def test_one_seed_is_inconclusive(judge, write, tmp_path: Path) -> None:
    results = load(write(tmp_path / "one", seeds=(0,)))
    verdict = judge("eval.bpb", "switch", "dense")(results)
    assert verdict.status == "inconclusive"
    assert "1 finished seeds" in verdict.text
    assert math.isnan(verdict.effect)


def test_only_common_seeds_are_paired(comparison: Path) -> None:
    (comparison / "dense/seed1/summary.json").unlink()
    verdict = less("eval.bpb", "switch", "dense")(load(comparison))
    # -.10 and -.11: s = .00707, h = 6.314 * .00707 / sqrt(2) = .0316.
    assert verdict.n == 2
    assert verdict.half_width == pytest.approx(0.03157, abs=1e-5)


def test_other_data_is_not_comparable(comparison: Path) -> None:
    path = comparison / "dense/seed0/run.json"
    path.write_text(path.read_text().replace("f00d", "beef"))
    verdict = less("eval.bpb", "switch", "dense")(load(comparison))
    assert verdict.status == "inconclusive"
    assert "different data" in verdict.text


def test_a_diverged_arm_is_not_better(comparison: Path) -> None:
    edit_eval(comparison, "switch/seed1", bpb=math.nan)
    results = load(comparison)
    worse = less("eval.bpb", "switch", "dense")(results)
    assert worse.status == "not held"
    assert "switch/seed1" in worse.text
    assert at_most("eval.bpb", "switch", "dense")(results).status == "not held"
    assert less("eval.bpb", "dense", "switch")(results).status == "inconclusive"
    assert similar("eval.bpb", "switch", "dense")(results).status == "inconclusive"


def test_an_absent_metric_is_named(results: Results) -> None:
    verdict = less("eval.no_such_metric", "switch", "dense")(results)
    assert verdict.status == "inconclusive"
    assert "switch/seed0 has no eval.no_such_metric" in verdict.text


def test_leaking_arms_are_named(results: Results) -> None:
    text = less("eval.bpb", "expert_choice", "switch")(results).text
    assert "expert_choice: not causal in training" in text
    assert "causal" not in less("eval.bpb", "switch", "dense")(results).text


def test_unknown_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="X1: strength 'Z'"):
        Claim("X1", "s", "src", "Z", less("eval.bpb", "a", "b"))  # type: ignore[arg-type]
