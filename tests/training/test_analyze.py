"""`moejax analyze` of a small run: every file is there, and says what was measured."""

import json

import numpy as np
import pytest

from moejax.analyzing.subject import analyse_run, analyse_trace
from moejax.analyzing.write import write_analysis
from moejax.tracing import Part, TraceWriter
from moejax.training.evaluate import evaluate
from moejax.training.loop import train
from moejax.training.records import read_records
from moejax.training.saved import open_run
from moejax.training.traced import trace_meta, traces
from tests import tiny


@pytest.fixture(scope="module")
def config():
    """That of `finished`, but for the saving: no training step is compiled anew."""
    saving = {"log_every": 6, "eval_every": 6, "checkpoint_every": 4, "keep": 3}
    return tiny.tiny(router=tiny.LOSS_FREE, train={**saving, "eval_without": True})


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    """Three checkpoints."""
    workdir = tmp_path_factory.mktemp("analysed") / "run"
    train(config, workdir, quiet=True)
    return workdir


@pytest.fixture(scope="module")
def found(workdir):
    return analyse_run(workdir, rows=16)


@pytest.fixture(scope="module")
def out(found, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis")
    return out, write_analysis(found, out)


def test_it_measures_what_evaluation_evaluates(workdir, found):
    run = open_run(workdir, progress=False)
    record = evaluate(run.config, run.program, run.state, run.dataset)
    figures = found.measures.figures()
    assert figures["max_vio"].value.mean() == pytest.approx(float(record["max_vio_global"]))
    assert figures["max_vio"].random.mean() == pytest.approx(record["max_vio_floor"])
    assert figures["domains"].value.mean() == pytest.approx(record["specialisation"])
    assert found.ablation["whole"] == pytest.approx(record["bpb"], rel=1e-5)
    assert found.measures.load.tokens == record["tokens"]


def test_an_expert_that_a_token_has_is_missed_and_no_other(found):
    ablation = found.ablation
    others = [ablation["other"], *ablation["other_layer"]]
    assert others == pytest.approx([ablation["whole"]] * 3, rel=1e-6)
    assert len(ablation["rank"]) == 2 and len(ablation["rank_0_layer"]) == 2
    costs = [*ablation["rank"], *ablation["rank_0_layer"], ablation["chosen"]]
    costs += ablation["chosen_layer"]
    assert np.isfinite(costs).all()
    assert (np.abs(np.array(costs) - ablation["whole"]) > 1e-6).all()
    # In one layer alone is not what it is in both, nor in the other.
    assert len(set(np.round(costs[:4], 6))) == 4


def test_the_runs_last_evaluation_recorded_the_same(config, workdir, found):
    first, last = (r for r in read_records(workdir / "metrics.jsonl") if r["kind"] == "eval")
    assert "without" not in first
    # Of 4 experts a quarter is one; 1/16 and 1/8 are none, and none is shared.
    assert last["without"] == pytest.approx({"best_0.25": found.ablation["rank"][0]}, rel=1e-6)
    # The same command again, when nothing is left to do.
    (workdir / "summary.json").unlink()
    assert train(config, workdir, quiet=True)["eval"] == last


def test_earlier_checkpoints_are_compared_with_the_analysed_one(workdir, found):
    assert list(found.saturation) == [4, 8]
    early, late = (found.saturation[step] for step in (4, 8))
    assert (late.value > early.value).all() and (late.value < 1).all()
    assert late.random.tolist() == [0.5, 0.5]  # 2 of 4 experts
    first = analyse_run(workdir, rows=8, step=4, ablation=False)
    assert first.saturation == {} and first.ablation is None


def test_all_files_are_written(found, out):
    folder, text = out
    kept = json.loads((folder / "analysis.json").read_text())
    figures = found.measures.figures()
    assert kept["figures"].keys() == figures.keys() and len(figures) == 13
    assert kept["figures"]["max_vio"]["value"] == figures["max_vio"].value.tolist()
    names = "load domains specialisation repetition predictability coactivation saturation ablation"
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert pictures == set(names.split())
    page = (folder / "analysis.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "http" not in page.replace("http://www.w3.org", "")
    for words in ("MaxVio", "by chance", "Ids of each expert", "bytes"):
        assert words in page
    assert "Routing beside chance" in text and "choice 1, in all layers" in text


def test_a_file_of_text_is_cut_by_the_runs_tokeniser(workdir, tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("def f(x):\n    return x\n" * 20)
    found = analyse_run(workdir, data=str(file))
    assert np.isfinite(found.ablation["whole"])  # rows of no domain count too
    # Bytes, and the separator as a target: the first id is the target of none.
    assert found.measures.load.tokens == len(file.read_bytes())
    assert "domains" not in found.measures.figures()
    assert write_analysis(found, tmp_path / "out")
    for text, words in (("", "holds no token"), ("a\0b", "NUL")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            analyse_run(workdir, data=str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        analyse_run(workdir, data=str(file))
    with pytest.raises(ValueError, match="has no domains"):
        analyse_run(workdir, data=str(file), domains=("code",))


def test_a_part_of_the_domains(workdir):
    found = analyse_run(workdir, domains=("prose",), rows=8, ablation=False)
    assert found.measures.domains.names == ("prose",)


def test_a_trace_that_is_cut_short_is_analysed_as_far_as_it_goes(workdir, found, tmp_path):
    run = open_run(workdir, progress=False)
    batches = run.dataset.validation_batches(limit_rows=16)
    writer = TraceWriter(tmp_path, trace_meta(run.config, run.dataset))
    for number, trace in enumerate(traces(run, batches), 1):
        writer.add(Part(number, trace, np.bincount(trace.document_T)))
        writer.flush()
    whole = analyse_trace(tmp_path)
    figures, mine = whole.measures.figures(), found.measures.figures()
    assert not whole.caveats
    for name, figure in figures.items():
        np.testing.assert_allclose(figure.value, mine[name].value, rtol=1e-6, err_msg=name)
    first, second = sorted(tmp_path.glob("*.npz"))
    second.write_bytes(second.read_bytes()[:100])
    part = analyse_trace(tmp_path)
    assert "is cut short" in part.caveats[0]
    assert 0 < part.measures.load.tokens < whole.measures.load.tokens
    assert part.caveats[0] in write_analysis(part, tmp_path / "out")
    first.write_bytes(b"")
    with pytest.raises(ValueError, match="is cut short"):
        analyse_trace(tmp_path)
