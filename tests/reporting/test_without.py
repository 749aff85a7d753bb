"""What models lose without their best and shared experts: the table, and DeepSeekMoE's claims, on
known numbers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from experiments import deepseek_moe
from moejax.reporting import Results, load
from moejax.reporting.claims import Verdict
from moejax.reporting.tables import all_tables, without_table

BPB = {"deepseek": (2.0, 2.1, 2.2), "gshard_1.5": (2.1, 2.2, 2.3), "dense": (2.4, 2.5, 2.6)}
# What bits per byte rise by, at each seed.
DEEPSEEK = {"shared": (0.40, 0.44, 0.42), "best_0.125": (0.30, 0.31, 0.32)}
DEEPSEEK |= {"best_0.25": (0.50, 0.51, 0.52)}
GSHARD = {"best_0.125": (0.10, 0.12, 0.11), "best_0.25": (0.30, 0.32, 0.31)}


@pytest.fixture
def results(write: Callable[..., Path], tmp_path: Path) -> Callable[..., Results]:
    """results(without) of runs that record so much more than their bpb."""

    def made(without: Mapping[str, Mapping[str, tuple[float, ...]]]) -> Results:
        dense = {"config": {"moe": {"experts": 0}}}
        arms = {arm: {"bpb": bpb, **(dense if arm == "dense" else {})} for arm, bpb in BPB.items()}
        out = write(tmp_path / "out", arms)
        for arm, more in without.items():
            for seed, bpb in enumerate(BPB[arm]):
                path = out / arm / f"seed{seed}/summary.json"
                summary = json.loads(path.read_text())
                summary["eval"]["without"] = {k: bpb + rise[seed] for k, rise in more.items()}
                path.write_text(json.dumps(summary))
        return load(out)

    return made


def verdict(claim: str, found: Results) -> Verdict:
    return next(c for c in deepseek_moe.claims() if c.id == claim).judge(found)


def test_the_table_shows_what_is_lost(results: Callable[..., Results]) -> None:
    table = without_table(results({"deepseek": DEEPSEEK, "gshard_1.5": GSHARD}))
    labels = [column.label for column in table.columns]
    assert labels == [
        *("variant", "bpb", "without shared"),
        *("without best 0.125", "without best 0.25"),
    ]
    assert table.texts() == [
        ["deepseek", "2.1000", "+0.4200 ± 0.0200", "+0.3100 ± 0.0100", "+0.5100 ± 0.0100"],
        ["gshard_1.5", "2.2000", "–", "+0.1100 ± 0.0100", "+0.3100 ± 0.0100"],
    ]


def test_there_is_no_table_without_records(results: Callable[..., Results]) -> None:
    assert "without" not in [table.name for table in all_tables(results({}), [])]


def test_the_shared_expert_is_worth_ten_margins(results: Callable[..., Results]) -> None:
    # 2.40 / 2.0, 2.54 / 2.1 and 2.62 / 2.2 = 1.2, 1.2095, 1.1909: mean 1.2001.
    found = results({"deepseek": DEEPSEEK})
    assert verdict("DM3", found).status == "held"
    assert verdict("DM3", found).effect == pytest.approx(1.2001, abs=1e-4)
    assert verdict("DM5", found).n == 0  # GShard has no record


def test_a_shared_expert_worth_less(results: Callable[..., Results]) -> None:
    small = {**DEEPSEEK, "shared": (0.08, 0.09, 0.08)}
    assert verdict("DM3", results({"deepseek": small})).status == "not held"


@pytest.mark.parametrize(
    ("deepseek", "gshard", "status"),
    [
        (DEEPSEEK, GSHARD, "held"),
        # 1/4 costs GShard more: both shares must cost it less.
        (DEEPSEEK, {**GSHARD, "best_0.25": (0.60, 0.62, 0.61)}, "not held"),
        (GSHARD, GSHARD, "inconclusive"),
    ],
)
def test_fine_experts_are_missed_more(
    results: Callable[..., Results], deepseek: dict, gshard: dict, status: str
) -> None:
    found = verdict("DM5", results({"deepseek": deepseek, "gshard_1.5": gshard}))
    assert found.status == status
    assert "eval.without.best_0.125 - eval.bpb: deepseek - gshard_1.5" in found.text
