"""The written report: tables derived again from summary.json, a sound HTML page, real images."""

import json
import math
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moejax.reporting import (
    Claim,
    Suite,
    at_most,
    less,
    load,
    positive,
    write_report,
)
from moejax.reporting.cells import Column, Table, markdown, terminal
from moejax.reporting.figures import BASELINE_COLOUR, colours, smooth
from moejax.routing.floors import drop_floor, max_vio_floor

FIGURES = {
    *("endpoints", "loss", "seconds", "domains", "max_vio", "drops", "load", "load_history"),
    *("layers", "saturation"),
}


@pytest.fixture
def suite(arms) -> Suite:
    claims = (
        Claim("SW1", "switch < dense", "paper one", "S", less("eval.bpb", "switch", "dense")),
        Claim("X1", "dense < switch", "nobody", "S", less("eval.bpb", "dense", "switch")),
        Claim("LF2", "loss_free < switch", "two", "D", less("eval.bpb", "loss_free", "switch")),
        Claim("EC5", "a leak", "three", "S", positive("eval.leak", "expert_choice")),
        Claim("R1", "report", "four", "R", at_most("eval.bpb", "topk", "switch")),
        Claim("N1", "nothing", "five", "D", less("eval.bpb", "absent", "dense")),
    )
    return Suite(
        "synthetic",
        "Which router learns most?",
        "smoke",
        variants={name: {} for name in arms},
        claims=claims,
    )


class Page(HTMLParser):
    """Collects tags with their attributes, checks that they nest, and gathers the text."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_end_to_end(comparison: Path, suite: Suite, tmp_path: Path) -> None:
    out = tmp_path / "report"
    text = write_report(load(comparison), suite, out)
    check_terminal(text)
    check_tables(out, text)
    check_numbers(out)
    check_html(out)
    check_images(out)
    assert not [p for p in out.rglob("*") if p.name.startswith(".")]


def check_terminal(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 120
    assert "2 of 5 claims held, 1 not held, 2 inconclusive (1 not measured); 1 reported" in text
    assert "2.4000 ± 0.0300" in text  # switch: 2.40, 2.43, 2.37: sd .03
    assert "-0.1000 ± 0.0169" in text  # against dense, as in the verdict
    assert "expert_choice †" in text and "† expert_choice: as trained" in text
    assert "0 finished seeds of absent and dense" in text


def check_tables(out: Path, text: str) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["tables"]) == [
        *("verdicts", "loss", "domains", "routing", "size", "speed", "config"),
    ]
    written = (out / "report.md").read_text()
    for found in summary["tables"].values():
        table = Table.from_json(found)
        assert terminal(table) in text
        assert markdown(table).rstrip() in written
    assert [v["status"] for v in summary["verdicts"]] == [
        *("held", "not held", "inconclusive", "held", "inconclusive", "inconclusive"),
    ]


def check_numbers(out: Path) -> None:
    """The cells follow from the runs in the same file."""
    summary = json.loads((out / "summary.json").read_text())
    rows = {row[0]: row for row in summary["tables"]["loss"]["rows"]}
    for variant, row in rows.items():
        runs = [r for r in summary["runs"] if r["variant"] == variant.split()[0]]
        bpb = [r["summary"]["eval"]["bpb"] for r in runs]
        assert row[2] == pytest.approx([np.mean(bpb), np.std(bpb, ddof=1)])
    labels = [column["label"] for column in summary["tables"]["loss"]["columns"]]
    assert rows["expert_choice †"][labels.index("leak")] == pytest.approx(0.15)
    routing = {row[0]: row for row in summary["tables"]["routing"]["rows"]}
    assert "dense" not in routing
    assert routing["topk"][7] == pytest.approx(max_vio_floor(2048, 8, 2))
    assert routing["topk"][2] == "1.0 / 5.0"
    assert routing["topk"][3] == pytest.approx(drop_floor(128, 8, 2, 1.0))
    assert routing["expert_choice †"][3] is None  # nothing can be dropped
    size = {row[0]: row for row in summary["tables"]["size"]["rows"]}
    assert size["switch"][6] == 60 * 2048
    assert size["switch"][-1] == 2e-3


def check_html(out: Path) -> None:
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            target = attributes.get(name) or ""
            assert not target or target.startswith(("#", "data:image/png;base64,"))
    assert "@import" not in text and "url(" not in text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(FIGURES) and all(len(i["alt"] or "") > 40 for i in images)
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {f"figure-{name}" for name in FIGURES} <= ids
    links = {a["href"] for tag, a in page.tags if tag == "a"}
    assert {(link or "")[1:] for link in links} <= ids
    scopes = {a.get("scope") for tag, a in page.tags if tag == "th"}
    assert scopes == {"col", "row"}
    assert text.index("table-verdicts") < text.index("table-loss") < text.index("figure-loss")
    for said in ("✓", "✗", "SW1", "paper one", "f00d", "abc1234", "jax 0.10.2", "moejax compare"):
        assert said in page.text
    assert "prefers-color-scheme: dark" in text


def check_images(out: Path) -> None:
    assert {path.stem for path in (out / "figures").glob("*.png")} == FIGURES
    for path in (out / "figures").glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[0] > 200 and pixels.shape[1] > 500
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, path.name


def test_a_dense_only_comparison_has_no_routing(write, arms, tmp_path: Path) -> None:
    out = write(tmp_path / "out", {"dense": arms["dense"]})
    text = write_report(load(out), Suite("s", "q", "smoke", {"dense": {}}), tmp_path / "report")
    assert "MaxVio" not in text and "Verdicts" not in text
    assert "No claims to judge" in text
    figures = {path.stem for path in (tmp_path / "report/figures").glob("*.png")}
    assert figures == {"loss", "seconds", "domains"}


def test_a_diverged_run_is_reported(comparison: Path, suite: Suite, tmp_path: Path) -> None:
    for name in ("summary.json", "metrics.jsonl"):
        path = comparison / "switch/seed1" / name
        path.write_text(path.read_text().replace('"bpb": 2.43', '"bpb": NaN'))
    text = write_report(load(comparison), suite, tmp_path / "report")
    assert "switch/seed1 has eval.bpb = nan" in text
    summary = json.loads((tmp_path / "report/summary.json").read_text())
    table = Table.from_json(summary["tables"]["loss"])
    assert terminal(table) in text


@pytest.mark.usefixtures("no_figures")
def test_arms_that_nobody_trained_are_told_in_a_line(
    comparison: Path, suite: Suite, tmp_path: Path
) -> None:
    for arm in ("topk", "loss_free"):
        shutil.rmtree(comparison / arm)
    shutil.rmtree(comparison / "switch/seed2")
    text = write_report(load(comparison), suite, tmp_path / "report")
    assert "Not trained: loss_free, topk." in text and "Incomplete: topk" not in text
    assert "Incomplete: switch/seed2: not started." in text
    assert "(2 not measured)" in text  # LF2, without its arm now, and N1


@pytest.mark.usefixtures("no_figures")
def test_incomplete_runs_are_told_first(comparison: Path, suite: Suite, tmp_path: Path) -> None:
    (comparison / "topk/seed2/summary.json").unlink()
    text = write_report(load(comparison), suite, tmp_path / "report")
    assert text.index("Incomplete: topk/seed2") < text.index("Verdicts")
    assert "Incomplete: topk/seed2" in Page((tmp_path / "report/report.html").read_text()).text


def test_nothing_finished_is_an_error(comparison: Path, suite: Suite, tmp_path: Path) -> None:
    for path in comparison.glob("*/*/summary.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no finished run"):
        write_report(load(comparison), suite, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("no_figures")
def test_markup_in_names_is_escaped(write, arms, suite: Suite, tmp_path: Path) -> None:
    out = write(tmp_path / "out", arms)
    path = out / "suite.json"
    path.write_text(path.read_text().replace("the switch arm", "a <b>bold</b> & arm"))
    write_report(load(out), suite, tmp_path / "report")
    page = Page((tmp_path / "report/report.html").read_text())
    assert "a <b>bold</b> & arm" in page.text


def test_wide_tables_continue_below_and_keep_every_cell() -> None:
    columns = (Column("variant"), *(Column(f"a long domain name {i}", "bpb") for i in range(9)))
    table = Table("t", "T", columns, (("switch", *(float(i) for i in range(9))),))
    text = terminal(table, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("switch") > 1
    assert all(f"{float(i):.4f}" in text for i in range(9))


def test_cells_that_are_no_numbers() -> None:
    columns = (Column("a"), Column("b", "bpb"), Column("c", "bpb"), Column("d", "percent"))
    table = Table("t", "T", columns, (("x", None, [math.nan, None], math.inf),))
    assert table.texts() == [["x", "–", "nan", "inf"]]
    again = Table.from_json(json.loads(json.dumps(table.to_json(), allow_nan=False)))
    assert again.texts() == table.texts()


def test_smoothing_keeps_level_and_ends() -> None:
    line = np.arange(500.0)
    np.testing.assert_allclose(smooth(line), line)  # a centred mean leaves a straight line alone
    noise = np.random.default_rng(0).normal(size=500)
    assert smooth(noise).std() < 0.5 * noise.std()


@pytest.mark.usefixtures("no_figures")
def test_the_same_results_give_the_same_bytes(
    comparison: Path, suite: Suite, tmp_path: Path
) -> None:
    results = load(comparison)
    for name in ("one", "two"):
        write_report(results, suite, tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["report.html", "report.md", "suite.json", "summary.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_variants_keep_their_colour(comparison: Path) -> None:
    results = load(comparison)
    found = colours(results)
    assert found["dense"] == (BASELINE_COLOUR, "-")
    assert len(set(found.values())) == 5
    many = replace(results, variants={f"v{i}": "" for i in range(20)})
    assert len(set(colours(many).values())) == 21
