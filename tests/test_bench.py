"""The benchmark at a size where it takes no time: what it measures, keeps, and shows."""

import json
import time

import numpy as np
import pytest

from moejax.benching import layer, peers, show
from moejax.benching.budgets import layer_budgets, step_budgets
from moejax.benching.layer import Measured
from moejax.benching.shapes import (
    CASES,
    GPU_CASES,
    Case,
    narrowed,
    passes,
    plan_of,
    sweep,
    wanted,
)
from moejax.benching.step import Peer, Step
from moejax.benching.timing import in_turns

TINY = Case("tiny", 8, 16, 4, 2, 64, ways=("einsum", "gather", "dropless", "ragged_dot"))


@pytest.fixture(scope="module")
def lines():
    found, failed = layer.measure(TINY, repeats=2)
    assert not failed
    return found


def test_every_way_is_measured_beside_the_dense_network(lines) -> None:
    assert [line.way for line in lines] == ["dense", *TINY.ways]
    for line in lines:
        assert 0 < line.low <= line.seconds <= line.high and line.compile_seconds > 0
        assert line.flops_per_s == pytest.approx(3 * 6 * 64 * 2 * 8 * 16 / line.seconds)
        assert line.key == f"tiny | {line.way} | forward + backward"
    assert lines[0].share == 1.0 and all(line.temp_bytes > 0 for line in lines[1:])


@pytest.mark.parametrize("case", [TINY, TINY._replace(ways=("experts", "layer"))])
def test_ways_compute_the_same(case) -> None:
    """So that what is compared is comparable: the experts' part of each equals the dispatch's."""
    found = layer.candidates(case, np.float32)
    shapes = {way: function(*arguments).shape for way, (function, arguments) in found.items()}
    rows = {"dense", "ragged_dot", "experts"}
    for way, shape in shapes.items():
        wanted = (128, 8) if way in rows else (1, 64, 8) if way == "layer" else (64, 8)
        assert shape == wanted, way
    if "gather" in found:  # at an even load nothing drops from buffers of 1.25
        outputs = [found[way][0](*found[way][1]) for way in ("einsum", "gather")]
        np.testing.assert_allclose(*outputs, atol=1e-5)


def test_skews_are_what_they_say() -> None:
    loads = {skew: plan_of(TINY._replace(skew=skew)).load_E for skew in ("uniform", "zipf", "one")}
    assert loads["one"].tolist() == [64, 64, 0, 0]
    assert loads["zipf"][0] > 1.5 * loads["zipf"][3] and loads["uniform"].max() < 45
    assert all(load_E.sum() == 128 for load_E in loads.values())


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in (*CASES, *GPU_CASES, *sweep())]
    assert len(set(names)) == len(names) > 15
    assert {case.skew for case in sweep()} == {"uniform", "zipf", "one"}


def line(case: str, way: str, share: float) -> Measured:
    return Measured(case, "D8", "uniform", way, True, 0.1, 0.1, 0.1, 1e9, share, 2**20, 1.0)


def test_ratios_are_held_against_their_budgets() -> None:
    found = layer_budgets(
        [
            *(line("large", way, share) for way, share in (("dense", 1.0), ("dropless", 0.8))),
            *(line("large", way, share) for way, share in (("experts", 1.0), ("layer", 0.9))),
            *(line("sixteen", way, share) for way, share in (("einsum", 0.2), ("gather", 0.7))),
        ]
    )
    assert [(row.what, row.ratio, row.held) for row in found] == [
        ("dropless / dense, uniform load", 0.8, False),
        ("gather / one-hot einsum, E=16", pytest.approx(3.5), True),
        ("router + dispatch + combine, share", pytest.approx(0.1), True),
    ]


def test_a_saved_run_stands_beside_a_new_one(lines, tmp_path) -> None:
    peer = Peer("HF Mixtral", 0.4, 0.4, 0.4, 1e3, ours=2.0)
    whole = Step(0.2, 0.2, 0.2, 2e3, 0.5, 0.01, 3.0, 4.0, 2**20, peer)
    budgets = step_budgets(whole)
    refused = [layer.Failed("tiny", "tokamax", both, "sm_100 only") for both in (True, False)]
    there = show.machine("float32", [TINY, TINY._replace(name="other")])
    run = show.Bench(there, lines, refused, budgets, whole, {4: 1.0, 16: 1.1})
    show.write(show.Bench(there, lines), tmp_path)  # before there is a step
    assert json.loads((tmp_path / "cpu.json").read_text())["step"] is None
    show.write(run, tmp_path)
    before = show.shares_of(tmp_path / "cpu.json")
    assert before == {line.key: line.share for line in lines}
    text = show.text(run, dict.fromkeys(before, 0.125))
    assert text.count("    0.12") + text.count("    0.13") >= len(lines)
    assert "experts on sorted rows, tiny, other: blocks (lax.ragged_dot is masked-dense" in text
    page = (tmp_path / "cpu.md").read_text()
    for where in (text, page):
        assert "compile time by layers: 1.0 s at 4, 1.1 s at 16" in where
        assert "in turns, ours is 2.00 times as fast" in where
        assert where.count("left out, tiny, tokamax: sm_100 only") == 1
    assert "| training step / HF Mixtral's | 2.00 | >= 1.5 |" in page
    assert page.count("| uniform | ") == len(lines)
    assert json.loads((tmp_path / "cpu.json").read_text())["step"]["peer"]["ours"] == 2.0
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what `moejax bench --out` wrote"):
        show.shares_of(tmp_path / "other.json")


def test_a_way_that_does_not_run_is_left_out_and_says_why() -> None:
    """JAX's kernels for GPUs, here; a peer that gives up."""

    def gives_up():
        raise RuntimeError("out of memory\nand more")

    case = TINY._replace(ways=("hopper", "experts"))
    found, failed = layer.measure(case, 1, False, peers={"theirs": lambda: 0, "other": gives_up})
    assert [line.way for line in found] == ["dense", "experts", "theirs"]
    assert [(line.way, line.both) for line in failed] == [("hopper", False), ("other", False)]
    assert "take 16-bit numbers, not float32" in failed[0].why and failed[1].why == "out of memory"


def test_quick_calls_share_a_turn() -> None:
    calls = []
    seconds = in_turns({"quick": lambda: calls.append(0), "slow": lambda: time.sleep(0.03)}, 2)
    assert len(calls) > 2 * 20 and seconds["slow"].min() >= 0.03 and seconds["quick"].max() < 0.01


def test_a_gpu_has_cases_of_its_own() -> None:
    on_cpu, on_gpu = (wanted([], False, gpu) for gpu in (False, True))
    assert on_cpu == (list(CASES), True) and on_gpu == (list(GPU_CASES), False)
    assert wanted(["many", "step"], False, False) == ([GPU_CASES[1]], True)
    with pytest.raises(ValueError, match="no case 'none'; there are: .*many, mixtral"):
        wanted(["none"], False, True)
    assert passes(on_gpu[0], False) == [(c, both) for both in (True, False) for c in GPU_CASES]


def test_peers_run_what_ours_runs() -> None:
    for both in (True, False):
        found = peers.runs(TINY, both, "float32")
        assert set(found) == ({"HF Mixtral", "torch grouped"} if peers.possible() else set())
        for run in found.values():
            run().block_until_ready()
    assert peers.runs(TINY._replace(skew="zipf"), True, "float32") == {}


def test_peers_that_are_not_installed_are_left_out(monkeypatch) -> None:
    monkeypatch.setattr(peers, "possible", lambda: False)
    assert peers.runs(TINY, True, "float32") == {}


def test_only_some_ways_are_measured_and_a_choice_made_where_it_is_needed() -> None:
    assert narrowed(CASES, []) == list(CASES)
    cases = narrowed(GPU_CASES, ["hopper", "gather"])
    assert [case.ways for case in cases] == [("gather", "hopper")] * 2
    assert show.machine("bfloat16", cases)["grouped"] == {}
    assert [*show.machine("float32", CASES[:1])["grouped"]] == ["large"]
    with pytest.raises(ValueError, match="--ways: no line 'none'; there are: dropless, .*tokamax"):
        narrowed(GPU_CASES, ["none"])
