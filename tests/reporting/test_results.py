"""Reading run directories: merges, duplicates, torn files, incomplete runs."""

import json
from pathlib import Path

import pytest

from moejax.reporting import load
from moejax.reporting.fairness import caveats, config_differences, learning_rates
from moejax.reporting.results import lookup
from moejax.reporting.tables import loss_table


def test_reads_every_run(comparison: Path) -> None:
    results = load(comparison)
    assert (results.name, results.scale, results.baseline) == ("synthetic", "smoke", "dense")
    assert len(results.runs) == 15
    assert results.incomplete == {}
    assert results.suite["question"] == "Which router learns most?"
    run = results.of("switch")[1]
    assert run.value("eval.bpb") == 2.43
    assert run.value("eval.bpb_domain.code") == pytest.approx(2.13)
    assert run.value("run.params.total") == 900_000
    assert run.value("config.router.k") == 1
    assert run.value("eval.no") is None
    assert run.value("eval.bpb_domain") is None
    assert len(run.train) == 60 and len(run.evals) == 6


def test_lookup_in_keys_with_dots_and_lists() -> None:
    tree = {"bpb": {"wiki.en": 1.0}, "drop_k": [0.1, 0.2], "a.b": {"c": 3}}
    assert lookup(tree, "bpb.wiki.en") == 1.0
    assert lookup(tree, "drop_k.1") == 0.2
    assert lookup(tree, "a.b.c") == 3
    assert lookup(tree, "drop_k.2") is None
    assert lookup(tree, "drop_k.x") is None


def test_a_torn_last_line_is_ignored(comparison: Path) -> None:
    path = comparison / "switch/seed0/metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "step": 61, "lo')
    run = load(comparison).of("switch")[0]
    assert run.last_step == 60
    assert run.unreadable_lines == 0


def test_a_torn_line_inside_is_counted_and_told(comparison: Path) -> None:
    path = comparison / "switch/seed0/metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[5] = lines[5][:20]
    path.write_text("\n".join(lines) + "\n")
    results = load(comparison)
    assert results.of("switch")[0].unreadable_lines == 1
    assert any("switch/seed0: 1 unreadable lines" in line for line in caveats(results))


def test_alarms_are_told_and_other_kinds_ignored(comparison: Path) -> None:
    path = comparison / "switch/seed0/metrics.jsonl"
    lines = [
        {"kind": "alarm", "step": 40, "message": "expert 3 gets everything"},
        {"kind": "alarm", "step": 41, "message": "still"},
        {"kind": "note", "step": 41},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + path.read_text())
    results = load(comparison)
    assert results.of("switch")[0].unreadable_lines == 0
    told = "switch/seed0: 2 alarms, at step 40: expert 3 gets everything"
    assert caveats(results) == [told]


def test_train_numbers_that_the_summary_lacks(comparison: Path) -> None:
    run = load(comparison).of("topk")[0]
    assert "drop_k" not in run.summary["train"]
    assert run.value("train.drop_k.1") == pytest.approx(0.05)
    tail = [r["loss"] for r in run.train if r["step"] > 54]
    assert run.mean("loss", 0.9, 1.0) == pytest.approx(sum(tail) / 6)
    assert run.value("train.no") is None


def test_steps_repeated_by_a_resume_count_once(comparison: Path) -> None:
    path = comparison / "switch/seed0/metrics.jsonl"
    again = {"kind": "train", "step": 60, "seconds": 99.0, "loss": 7.0}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    run = load(comparison).of("switch")[0]
    assert len(run.train) == 60
    assert run.train[-1]["loss"] == 7.0


def test_incomplete_runs_are_listed_not_used(comparison: Path) -> None:
    (comparison / "switch/seed1/summary.json").unlink()
    (comparison / "topk/seed0/summary.json").write_text('{"step": 6')
    suite = json.loads((comparison / "suite.json").read_text())
    suite["variants"]["hash"] = "never ran"
    (comparison / "suite.json").write_text(json.dumps(suite))
    results = load(comparison)
    assert results.incomplete["switch/seed1"] == "no summary.json, stopped at step 60 of 60"
    assert "summary.json" in results.incomplete["topk/seed0"]
    assert results.incomplete["hash/seed2"] == "not started"
    assert len(results.runs) == 13
    assert sorted(results.of("switch")) == [0, 2]


def test_variants_run_on_different_machines_are_merged(write, arms, tmp_path: Path) -> None:
    first = write(tmp_path / "a", {k: arms[k] for k in ("dense", "switch")})
    second = write(tmp_path / "b", {k: arms[k] for k in ("loss_free",)})
    results = load(first, second)
    assert list(results.variants) == ["dense", "switch", "loss_free"]
    assert len(results.runs) == 9
    assert results.incomplete == {}


def test_a_run_present_twice_counts_once_and_the_finished_one_wins(write, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    (first / "switch/seed0/summary.json").unlink()
    results = load(first, second)
    assert len(results.runs) == 15
    assert results.of("switch")[0].path == second / "switch/seed0"


def test_the_same_run_with_another_config_is_refused(write, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    path = second / "switch/seed0/config.json"
    path.write_text(path.read_text().replace("0.002", "0.004"))
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.002 and 0.004") as error:
        load(first, second)
    message = str(error.value)
    assert str(first / "switch/seed0") in message and str(path.parent) in message
    assert "\n" not in message


def test_the_same_run_on_other_data_is_refused(write, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    path = second / "switch/seed0/run.json"
    path.write_text(path.read_text().replace("f00d", "beef"))
    with pytest.raises(ValueError, match=r"f00d and beef"):
        load(first, second)


def test_different_suites_are_refused(write, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    path = second / "suite.json"
    path.write_text(path.read_text().replace('"smoke"', '"small"'))
    with pytest.raises(ValueError, match="scale 'smoke' and 'small'"):
        load(first, second)


def test_a_directory_without_suite_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"suite.json not found"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no compare directory"):
        load()


def test_config_differences_leave_seeds_out(comparison: Path) -> None:
    found = config_differences(load(comparison))
    assert set(found) == {"moe.experts", "router.name", "router.k", "balance.load_balance"}
    assert found["router.k"]["topk"] == 2


def test_unequal_arms_are_told(comparison: Path) -> None:
    assert caveats(load(comparison)) == []
    path = comparison / "switch/seed2/config.json"
    path.write_text(path.read_text().replace('"batch": 16', '"batch": 32'))
    path = comparison / "switch/seed2/run.json"
    path.write_text(path.read_text().replace('"tokens_per_step": 2048', '"tokens_per_step": 4096'))
    path = comparison / "dense/seed0/run.json"
    path.write_text(path.read_text().replace("f00d", "beef"))
    told = caveats(load(comparison))
    assert any("tokens a step (2048:" in line and "4096: switch/seed2" in line for line in told)
    assert any("data (beef: dense/seed0" in line for line in told)
    assert any("Seeds of switch differ in data.batch: 16 (seed 0)" in line for line in told)


def test_what_is_not_matched_is_told_by_reason(comparison: Path) -> None:
    path = comparison / "suite.json"
    suite = json.loads(path.read_text())
    wide = "twice the width"
    suite["note"] = "cores shared"
    suite["unmatched"] = {"switch": wide, "loss_free": "no training", "topk": wide}
    path.write_text(json.dumps(suite))
    told = ["Not matched: switch, topk: twice the width.", "Not matched: loss_free: no training."]
    assert caveats(load(comparison)) == ["Note: cores shared.", *told]


def test_learning_rates_of_two_machines_are_told_together(write, arms, tmp_path: Path) -> None:
    assert learning_rates(load(write(tmp_path / "plain"))).startswith("untuned")
    for name, best in (("dense", 0.5), ("switch", 2.0)):
        out = write(tmp_path / name, {name: arms[name]})
        suite = json.loads((out / "suite.json").read_text())
        suite["learning_rates"] = {name: {"loss": {"0.5": 2.0, "2": None}, "best": best}}
        (out / "suite.json").write_text(json.dumps(suite))
    told = learning_rates(load(tmp_path / "dense", tmp_path / "switch"))
    assert "x0.5, x2" in told and told.endswith("dense x0.5, switch x2")


@pytest.mark.parametrize(
    ("tried", "best", "told"),
    [
        ({"0.5": 2.0, "1": 1.8, "2": 1.9}, 1.0, []),
        ({"0.5": 1.7, "1": 1.8, "2": 1.9}, 0.5, ["The best learning rate is the smallest"]),
        ({"0.5": 2.0, "1": 1.8, "2": 1.7}, 2.0, ["The best learning rate is the largest"]),
        ({"0.5": 2.0, "1": 1.8, "2": None}, 1.0, []),  # the largest diverged
    ],
)
def test_a_best_learning_rate_at_the_edge_is_told(comparison: Path, tried, best, told) -> None:
    suite = json.loads((comparison / "suite.json").read_text())
    suite["learning_rates"] = {"switch": {"loss": tried, "best": best}}
    (comparison / "suite.json").write_text(json.dumps(suite))
    found = caveats(load(comparison))
    assert [line.removesuffix(" that was tried: switch.") for line in found] == told


def test_losses_of_masked_tokens_are_called_so(comparison: Path) -> None:
    assert load(comparison).unit == "bits per byte"
    for path in comparison.glob("*/*/config.json"):
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "data": {**config["data"], "mask_rate": 0.15}}))
    (note,) = [n for n in loss_table(load(comparison)).notes if n.startswith("bpb:")]
    assert "bits per masked byte of" in note and "nats per masked token" in note
