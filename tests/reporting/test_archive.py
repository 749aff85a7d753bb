"""What a summary.json says follows from the runs in it: in a fresh report, and in all committed
ones."""

import json
import math
from pathlib import Path

import pytest

from moejax.compare import load_suite
from moejax.reporting import Claim, Suite, Window, falling, less, load, sooner, write_report
from moejax.reporting.archive import archived, restored
from moejax.reporting.cells import Table, jsonable, markdown
from moejax.reporting.report import judge
from moejax.reporting.tables import all_tables

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "experiments/results").glob("*/*/summary.json"))
# Written before a summary held its runs' records.
WITHOUT_RECORDS = {"catalogue/smoke", "routers/smoke"}


def name(path: Path) -> str:
    return "/".join(path.parts[-3:-1])


@pytest.fixture
def suite(arms) -> Suite:
    late = Window("max_vio", 0.8, 1)
    claims = (
        Claim("A", "lower", "one", "S", less("eval.bpb", "switch", "dense")),
        Claim("B", "from records", "two", "S", less(late, "loss_free", "switch")),
        Claim("C", "from evaluations", "three", "S", sooner("switch", "dense", "dense")),
        Claim("D", "diverged", "four", "D", falling("eval.bpb", "topk", "dense")),
    )
    return Suite("synthetic", "q", "smoke", variants={arm: {} for arm in arms}, claims=claims)


@pytest.mark.usefixtures("no_figures")
def test_everything_is_derived_again(comparison: Path, suite: Suite, tmp_path: Path) -> None:
    for file in ("summary.json", "metrics.jsonl"):  # one run that diverged
        path = comparison / "topk/seed1" / file
        path.write_text(path.read_text().replace('"bpb": 2.42', '"bpb": NaN'))
    write_report(load(comparison), suite, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert math.isnan(restored(summary).of("topk")[1].value("eval.bpb") or 0)
    check_derived(summary, suite)
    assert [v["n"] for v in summary["verdicts"]] == [3, 3, 3, 0]
    run = next(r for r in summary["runs"] if r["variant"] == "switch")
    run["summary"]["eval"]["bpb"] += 0.1
    with pytest.raises(AssertionError):
        check_derived(summary, suite)


def test_there_are_committed_results() -> None:
    assert {name(path) for path in COMMITTED} > WITHOUT_RECORDS


@pytest.mark.parametrize("path", COMMITTED, ids=name)
def test_committed_tables_are_those_of_the_json(path: Path) -> None:
    summary = json.loads(path.read_text())
    report = path.with_name("report.md").read_text()
    for table in summary["tables"].values():
        assert markdown(Table.from_json(table)).rstrip() in report
    for row in summary["tables"]["loss"]["rows"]:
        runs = [r for r in summary["runs"] if r["variant"] == row[0].split()[0]]
        bpb = [r["summary"]["eval"]["bpb"] for r in runs]
        assert row[2][0] == pytest.approx(sum(bpb) / len(bpb))


@pytest.mark.parametrize("path", [p for p in COMMITTED if name(p) not in WITHOUT_RECORDS], ids=name)
def test_committed_tables_and_verdicts_are_derived_again(path: Path) -> None:
    """With the claims as the experiment file states them today."""
    summary = json.loads(path.read_text())
    experiment, _, scale = summary["suite"]["experiment"].partition(":")
    check_derived(summary, load_suite(str(ROOT / experiment), scale))


def check_derived(summary: dict, suite: Suite) -> None:
    results = restored(summary)
    tables = all_tables(results, judge(results, suite))
    assert [table.name for table in tables] == list(summary["tables"])
    for table in tables:
        assert_same(json.loads(json.dumps(table.to_json())), summary["tables"][table.name])
    for (claim, verdict), told in zip(judge(results, suite), summary["verdicts"], strict=True):
        assert (claim.id, verdict.status, verdict.text) == (
            told["id"],
            told["status"],
            told["text"],
        )
        assert_same(jsonable(verdict.effect), told["effect"])


def assert_same(here: object, there: object) -> None:
    """Equal but for the last bits of numbers: Python 3.12 sums floats more exactly than 3.11."""
    if isinstance(here, dict) and isinstance(there, dict):
        assert list(here) == list(there)
        here, there = list(here.values()), list(there.values())
    if isinstance(here, list) and isinstance(there, list):
        assert len(here) == len(there)
        for a, b in zip(here, there, strict=True):
            assert_same(a, b)
    elif isinstance(here, float):
        assert here == pytest.approx(there, rel=1e-9, abs=1e-12)
    else:
        assert here == there


def test_a_summary_without_records_is_refused() -> None:
    with pytest.raises(ValueError, match="summary of old holds no records"):
        restored({"name": "old", "runs": [{"variant": "a"}]})


def test_no_folder_of_a_machine_is_kept(comparison: Path) -> None:
    path = comparison / "switch/seed0/config.json"
    config = json.loads(path.read_text())
    config["train"]["upcycle"] = "/home/someone/runs/dense/seed0"
    path.write_text(json.dumps(config))
    run = load(comparison).of("switch")[0]
    assert archived(run)["config"]["train"]["upcycle"] == "dense/seed0"
    assert "/home" not in json.dumps(archived(run))
