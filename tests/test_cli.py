"""The command line: bad input is one line, exit code 2, and nothing written; comparisons go on."""

import contextlib
import importlib
import importlib.util
import io
import json
import shutil
import sys

import jax
import pytest
from absl import flags

from moejax import cli
from moejax.tracing import open_trace
from moejax.training.records import read_records
from tests import tiny

EXPERIMENT = """
from moejax.config import default_config, override
from moejax.reporting import Claim, Suite, less
from tests.tiny import SIZES, data_dir


def get_config(scale="smoke"):
    if scale != "smoke":
        raise ValueError(f"unknown scale {scale!r}; known: smoke")
    changes = {"train.steps": 4, "train.log_every": 2, "data.data_dir": data_dir()}
    return override(default_config(), {**SIZES, "router.name": "switch", **changes})


def get_suite(scale="smoke"):
    return Suite(
        name="pair",
        scale=scale,
        question="Does it go through?",
        variants={"dense": {"moe.experts": 0}, "switch": {"balance.load_balance": 0.01}},
        seeds=(0, 1),
        claims=(Claim("P1", "better", "nobody", "S", less("eval.bpb", "switch", "dense")),),
    )
"""


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "experiments" / "pair.py"
    path.parent.mkdir()
    tiny.dataset()  # prepared here: its progress is nobody's error
    path.write_text(EXPERIMENT)
    single = path.with_name("single.py")
    single.write_text(EXPERIMENT.replace("get_suite", "another_name"))
    return path


@pytest.fixture(scope="session")
def compiled():
    """The seconds of every compilation since the session began."""
    seconds = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: (
            seconds.append(duration) if "backend_compile" in event else None
        )
    )
    return seconds


def forget_flags():
    """Verbs share names of flags, for a process has one verb."""
    known = flags.FLAGS
    for name in list(known):
        module = known.find_module_defining_flag(name) or ""
        if module.startswith("moejax") or name.partition(".")[0] in ("config", "experiment"):
            delattr(known, name)


@pytest.fixture(scope="session")
def moejax():
    """`moejax VERB ...` in this process: exit code, standard output, standard error."""

    def call(*argv):
        forget_flags()
        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            patch.setattr(sys, "path", [*sys.path])
            patch.setattr(sys, "argv", ["moejax", *map(str, argv)])
            if argv and argv[0] in cli.VERBS:
                name = cli.module_of(argv[0])
                for module in ("moejax.meeting", name):
                    if module in sys.modules:
                        importlib.reload(sys.modules[module])
            cli.main()
        return caught.value.code, out.getvalue(), err.getvalue()

    return call


def assert_refused(answer, *words):
    code, out, err = answer
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    for word in words:
        assert word in line


WRONG = [
    (["--config.moe.evry=2"], ["unknown config key moe.evry; did you mean moe.every?"]),
    (["--config.mo.every=2"], ["unknown config key mo.every", "did you mean moe.every"]),
    (["--config.zzz=2"], ["unknown config key zzz"]),
    (["--config.router.bias_rat=2"], ["unknown config key router.bias_rat"]),
    (["--config.train.steps=many"], ["train.steps", "many"]),
    (["--config.router.k=9", "--config.router.name=topk"], ["router.k"]),
    (["--config.moe.experts=0.5"], ["moe.experts", "0.5"]),
    (["--config.router.name=topk", "--config.router.bias_rat=2"], ["unknown config key"]),
    (["--config.router.name=swich"], ["unknown router 'swich'; did you mean 'switch'?"]),
    (["--config.data.batch=12"], ["batch 12 is not divisible by data x fsdp x expert = 8"]),
    (["--config.train.accumulation=3"], ["data.batch=8 is not divisible by train.accumulation=3"]),
    (["--config.mesh.tensor=3"], ["8 devices are not divisible by 3"]),
    (["--config.mesh.tensor=4"], ["=2 is not divisible by mesh axis tensor=4"]),
    (["--config.optimizer.warmup=4"], ["optimizer.warmup=4 must end before train.steps=4"]),
    (["--config.data.name=stdlb"], ["unknown corpus 'stdlb'; did you mean 'stdlib'?"]),
    (["--config.data.name=c4", "--config.data.data_dir={tmp}"], ["c4", "{tmp}"]),
    (["--config.data.domains=('cod',)"], ["no domain 'cod'; did you mean 'code'?"]),
    (["--config.data.data_dir={tmp}/file"], ["{tmp}/file"]),
    (["--wrkdir=x"], ["wrkdir", "workdir"]),
    (["surplus"], ["unknown argument 'surplus'"]),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_bad_input_of_train(moejax, experiment, tmp_path, compiled, arguments, words):
    (tmp_path / "file").write_text("precious")
    before = len(compiled)
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    answer = moejax("train", f"--config={experiment}", f"--workdir={tmp_path}/run", *arguments)
    assert_refused(answer, *(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert tiny.snapshot(tmp_path) == {"file": b"precious"}
    assert len(compiled) == before


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("router.k=99", "router.k=99 is more than moe.experts=16; lower k or add experts"),
        ("moe.capacity_factor=0", "moe.capacity_factor=0.0 leaves no slot (capacity < 1)"),
    ],
)
def test_bad_numbers_for_an_experiment_of_the_repository(moejax, tmp_path, argument, words):
    experiment = "experiments/loss_free.py:smoke"
    answer = moejax("train", experiment, f"--workdir={tmp_path}/run", f"--config.{argument}")
    assert_refused(answer, words)
    assert list(tmp_path.iterdir()) == []


def test_train_says_what_it_needs(moejax, experiment, tmp_path):
    assert_refused(moejax("train", f"--config={experiment}"), "--workdir")
    assert_refused(moejax("train", f"--workdir={tmp_path}/run"), "--config")
    assert_refused(moejax("train", "experiments/swich.py"), "no experiment file", "switch.py")
    answer = moejax("train", f"{experiment}:huge", f"--workdir={tmp_path}/run")
    assert_refused(answer, "unknown scale 'huge'; known: smoke")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_this_runs(moejax, experiment, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("precious")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{")
    before = tiny.snapshot(tmp_path)
    for folder, words in (("foreign", "is not empty"), ("damaged", "is not JSON")):
        answer = moejax("train", experiment, f"--workdir={tmp_path / folder}")
        assert_refused(answer, words, "choose another --workdir")
    assert tiny.snapshot(tmp_path) == before


def test_evaluate_and_report_say_what_is_missing(moejax, tmp_path):
    assert_refused(moejax("evaluate"), "usage: moejax evaluate WORKDIR")
    assert_refused(moejax("evaluate", tmp_path / "none"), "holds no run", "config.json")
    assert_refused(moejax("report"), "usage: moejax report DIR")
    assert_refused(moejax("report", tmp_path / "none"), str(tmp_path / "none"))
    assert list(tmp_path.iterdir()) == []


def test_bad_input_of_compare(moejax, experiment, tmp_path):
    out = f"--out={tmp_path}/out"
    single = experiment.with_name("single.py")
    assert_refused(moejax("compare"), "usage: moejax compare")
    assert_refused(moejax("compare", single, out), "has no get_suite")
    answer = moejax("compare", experiment, out, "--variants=dense,swich")
    assert_refused(answer, "unknown variant 'swich'", "known: dense, switch")
    assert_refused(moejax("compare", experiment, out, "--seeds=0,one"), "'one' is not a seed")
    assert_refused(moejax("compare", experiment, out, "--config.mesh.data=3"), "3")
    assert_refused(moejax("compare", experiment, out, "--config.train.accumulation=3"), "=3")
    assert list(tmp_path.iterdir()) == []


def test_without_a_verb_all_verbs_are_listed(moejax):
    for argv in ([], ["tarin"]):
        code, out, err = moejax(*argv)
        assert (code, out) == (2, "")
        assert all(f"moejax {verb}" in err for verb in cli.VERBS)
    assert "no verb 'tarin'" in err
    assert moejax("--help")[0] == 0


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_says_how_it_is_called(moejax, verb):
    code, out, err = moejax(verb, "--help")
    assert (code, err) == (0, "")
    assert f"moejax {verb}" in out
    assert verb not in ("train", "compare") or ("--workdir" in out) == (verb == "train")


def test_a_router_named_on_the_command_line_brings_its_options(moejax, experiment, tmp_path):
    named = ["--config.router.name=loss_free", "--config.router.bias_rate=0.5"]
    wrong = "--config.data.batch=12"  # refused after the router was read
    answer = moejax("train", experiment, f"--workdir={tmp_path}/run", *named, wrong)
    assert_refused(answer, "batch 12 is not divisible")
    answer = moejax("train", experiment, f"--workdir={tmp_path}/run", *named[1:])
    assert_refused(answer, "unknown config key router.bias_rate")


def finished(out):
    """Run -> when its summary was written, and the steps that its training records have."""
    return {
        str(path.parent.relative_to(out)): (
            path.stat().st_mtime_ns,
            [
                r["step"]
                for r in read_records(path.parent / "metrics.jsonl")
                if r["kind"] == "train"
            ],
        )
        for path in sorted(out.glob("*/*/summary.json"))
    }


@pytest.fixture(scope="module")
def compared(moejax, experiment, tmp_path_factory):
    """The folder of a comparison that has ended, and what it said."""
    out = tmp_path_factory.mktemp("compare") / "out"
    code, text, err = moejax("compare", experiment, f"--out={out}")
    assert code == 0, err
    return out, text


@pytest.fixture(scope="module")
def out(compared):
    return compared[0]


RUNS = ["dense/seed0", "dense/seed1", "switch/seed0", "switch/seed1"]


def test_compare_ends_in_a_report_and_again_trains_nothing(moejax, experiment, compared):
    out, text = compared
    first = finished(out)
    assert list(first) == RUNS
    assert {tuple(steps) for _, steps in first.values()} == {(2, 4)}
    assert "P1" in text and "dense" in text and "switch" in text
    page = (out / "report.html").read_text()
    assert "Does it go through?" in page and "P1" in page
    seeds = [json.loads((out / run / "summary.json").read_text())["bpb"] for run in RUNS]
    assert len(set(seeds)) == 4  # seeds and variants differ

    code, again, _ = moejax("compare", experiment, f"--out={out}")
    assert code == 0
    assert finished(out) == first
    assert again == text

    (out / "switch/seed1/summary.json").unlink()
    code, _, err = moejax("compare", experiment, f"--out={out}")
    assert code == 0
    second = finished(out)
    assert {run for run in RUNS if second[run] != first[run]} == {"switch/seed1"}
    assert "[1/1] switch/seed1" in err
    assert second["switch/seed1"][1] == [2, 4]
    assert json.loads((out / "switch/seed1/summary.json").read_text())["bpb"] == seeds[3]


def test_runs_of_a_report_are_finished_for_another_machine(moejax, experiment, out, tmp_path):
    """Of its summary.json alone; one run is missing there, and trained here."""
    part, new = tmp_path / "committed", tmp_path / "new"
    part.mkdir()
    shutil.copy(out / "suite.json", part)
    summary = json.loads((out / "summary.json").read_text())
    *kept, last = sorted(summary["runs"], key=lambda run: (run["variant"], run["seed"]))
    (part / "summary.json").write_text(json.dumps({**summary, "runs": kept}))
    code, text, err = moejax("compare", experiment, f"--have={part}", f"--out={new}")
    assert code == 0, err
    assert list(finished(new)) == [f"{last['variant']}/seed{last['seed']}"] == RUNS[-1:]
    again = json.loads((new / "summary.json").read_text())
    assert sorted(r["variant"] for r in again["runs"]) == ["dense", "dense", "switch", "switch"]
    for told in (again, summary):
        told["bpb"] = {(r["variant"], r["seed"]): r["summary"]["bpb"] for r in told["runs"]}
    assert again["bpb"] == summary["bpb"] and not again["incomplete"]
    assert [v["text"] for v in again["verdicts"]] == [v["text"] for v in summary["verdicts"]]

    answer = moejax("compare", experiment, f"--have={part}", "--config.model.ffn=64")
    assert_refused(answer, "--have: dense/seed0 was a run with model.ffn=32, this one has model")


def test_compare_refuses_the_folder_of_another_comparison(moejax, experiment, out):
    before = tiny.snapshot(out)
    answer = moejax("compare", experiment, f"--out={out}", "--config.model.ffn=64")
    assert_refused(answer, "model.ffn=32, this one has model.ffn=64")
    assert tiny.snapshot(out) == before


def test_each_variant_keeps_its_best_learning_rate(moejax, experiment, tmp_path):
    """0.001 of a learning rate learns nothing in 4 steps; the rate that does is kept, on other
    seeds than it was chosen on."""
    wanted = (f"--out={tmp_path}/tuned", "--seeds=0", "--variants=switch")
    code, text, err = moejax("compare", experiment, *wanted, "--learning_rates=0.001,2")
    assert code == 0, err
    suite = json.loads((tmp_path / "tuned/suite.json").read_text())
    assert suite["command"].endswith("--seeds=0 --learning_rates=0.001,2")
    rates = suite["learning_rates"]["switch"]
    assert rates["best"] == 2 and rates["loss"]["2"] < rates["loss"]["0.001"]
    assert "switch x2" in (tmp_path / "tuned/report.md").read_text()
    runs = {path: json.loads(path.read_text()) for path in tmp_path.rglob("config.json")}
    peaks = {(run["optimizer"]["learning_rate"], run["train"]["seed"]) for run in runs.values()}
    assert peaks == {(0.001 * 3e-3, 1), (2 * 3e-3, 1), (2 * 3e-3, 0)}
    again = moejax("compare", experiment, *wanted, "--learning_rates=0.001,2")
    assert again[1] == text


@pytest.mark.parametrize("words", ["0", "fast", "1,1", "-1", "inf"])
def test_impossible_learning_rates_are_refused(moejax, experiment, tmp_path, words):
    answer = moejax("compare", experiment, f"--out={tmp_path}/o", f"--learning_rates={words}")
    assert_refused(answer, "--learning_rates: ")
    assert not (tmp_path / "o").exists()


def test_variants_of_two_folders_join_in_one_report(moejax, experiment, out, tmp_path):
    for name in ("dense", "switch"):
        part = tmp_path / name
        code, _, err = moejax("compare", experiment, f"--out={part}", f"--variants={name}")
        assert code == 0, err
        assert list(finished(part)) == [run for run in RUNS if run.startswith(name)]
    answer = moejax("report", tmp_path / "dense", tmp_path / "switch", f"--to={tmp_path}/both")
    assert answer[0] == 0, answer
    assert (tmp_path / "both/report.html").is_file()
    whole = moejax("report", out, f"--to={tmp_path}/whole")
    assert verdicts(answer[1]) == verdicts(whole[1]) != []
    # The report alone is as good as the folders that it was made from.
    alone = moejax("compare", experiment, f"--have={tmp_path}/both", f"--out={tmp_path}/none")
    assert alone[0] == 0, alone
    assert verdicts(alone[1]) == verdicts(whole[1])
    assert not finished(tmp_path / "none")


def verdicts(text):
    return [line for line in text.splitlines() if "P1" in line]


def test_evaluate_prints_the_runs_own_bits_per_byte(moejax, out, tmp_path):
    run = out / "switch/seed0"
    before = tiny.snapshot(run)
    code, text, err = moejax("evaluate", run, "--rows=16", f"--trace={tmp_path}/trace")
    assert code == 0, err
    summary = json.loads((run / "summary.json").read_text())
    assert f"step 4: bits per byte {summary['bpb']:.4f} on" in text
    tokens = summary["eval"]["tokens"]
    assert f"trace of {tokens:,} tokens: {tmp_path}/trace" in text
    assert len(open_trace(tmp_path / "trace").read()) == tokens
    answer = moejax("evaluate", out / "dense/seed0", f"--trace={tmp_path}/no")
    assert_refused(answer, "no layer of this model routes tokens to experts")
    assert_refused(moejax("evaluate", run, "--step=3"), "no checkpoint of step 3", "[4]")
    assert tiny.snapshot(run) == before


def test_analyze_writes_a_page(moejax, out, tmp_path):
    run = out / "switch/seed0"
    before = tiny.snapshot(run)
    code, text, err = moejax("analyze", run, "--rows=16", "--noablation", f"--out={tmp_path}/a")
    assert code == 0, err
    assert "switch" in (tmp_path / "a/analysis.html").read_text()
    assert "MaxVio" in text and f"page: {tmp_path}/a/analysis.html" in text
    assert_refused(moejax("analyze", out / "dense/seed0"), "moe.experts=0", "nothing to analyse")
    assert_refused(moejax("analyze", run, "--step=3"), "no checkpoint of step 3", "[4]")
    assert_refused(moejax("analyze", run, "--data=stdlb"), "did you mean 'stdlib'")
    assert_refused(moejax("analyze", run, f"--data={tmp_path}/none.txt"), "none.txt")
    assert_refused(moejax("analyze"), "usage: moejax analyze RUN_OR_TRACE")
    assert_refused(moejax("analyze", tmp_path), "neither a run (config.json) nor a trace")
    assert tiny.snapshot(run) == before


def test_train_upcycles_a_dense_run(moejax, experiment, out, tmp_path):
    """The first update has rate 0: the evaluation after it is the dense model's last one."""
    renormalised = experiment.with_name("topk.py")
    topk = '"router.name": "topk", "router.renormalise": True'
    renormalised.write_text(EXPERIMENT.replace('"router.name": "switch"', topk))
    dense = out / "dense/seed0"
    flags = [f"--config.train.upcycle={dense}", "--config.train.eval_every=1"]
    code, _, err = moejax("train", renormalised, f"--workdir={tmp_path}/run", *flags)
    assert code == 0, err
    assert f"experts from step 4 of {dense}" in err
    first = next(r for r in read_records(tmp_path / "run/metrics.jsonl") if r["kind"] == "eval")
    bpb = json.loads((dense / "summary.json").read_text())["bpb"]
    assert (first["step"], first["bpb"]) == (1, pytest.approx(bpb, rel=1e-5))
    for flag, words in (
        (f"--config.train.upcycle={tmp_path}/none", "holds no run: there is no config.json"),
        (f"--config.train.upcycle={out}/switch/seed0", "has no dense feed-forward network"),
        ("--config.train.upcycle_optimizer=True", "needs train.upcycle"),
    ):
        answer = moejax("train", renormalised, f"--workdir={tmp_path}/no", flag)
        assert_refused(answer, words)
    assert not (tmp_path / "no").exists()


def test_train_records_a_routing_and_replays_it(moejax, experiment, tmp_path):
    replaying = experiment.with_name("replaying.py")
    router = '"router.name": "replay", "router.weight": "softmax"'
    replaying.write_text(EXPERIMENT.replace('"router.name": "switch"', router))
    record = "--config.train.trace_every=1"
    code, _, err = moejax("train", experiment, f"--workdir={tmp_path}/a", record)
    assert code == 0, err
    flag = f"--config.train.replay={tmp_path}/a"
    code, _, err = moejax("train", replaying, f"--workdir={tmp_path}/b", flag)
    assert code == 0, err
    first, second = (
        [r["loss"] for r in read_records(tmp_path / run / "metrics.jsonl") if r["kind"] == "train"]
        for run in ("a", "b")
    )
    assert first == pytest.approx(second, rel=1e-6)
    answer = moejax("train", replaying, f"--workdir={tmp_path}/no", f"{flag}/none")
    assert_refused(answer, "holds no trace; train that run with train.trace_every=1")
    answer = moejax("train", replaying, f"--workdir={tmp_path}/no", flag, "--config.moe.experts=8")
    assert_refused(answer, "traced with moe.experts=4, this run has 8")
    assert not (tmp_path / "no").exists()


def test_a_run_that_diverges_exits_with_1_and_keeps_what_was_saved(moejax, experiment, tmp_path):
    """The first update has rate 0; the second one makes the weights huge, the third step fails."""
    changes = {"optimizer.learning_rate": 1e30, "optimizer.clip": 0.0, "moe.experts": 0}
    changes |= {"train.steps": 9, "train.checkpoint_every": 1, "train.log_every": 1}
    arguments = [f"--config.{key}={value}" for key, value in changes.items()]
    code, _, err = moejax("train", experiment, f"--workdir={tmp_path}/run", *arguments)
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("error: step 3: loss ") and "position 24 of the data stream" in last
    assert [r["step"] for r in read_records(tmp_path / "run/metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "run/summary.json").exists()
    sections: dict[str, dict[str, object]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    state = tiny.saved_state(tmp_path / "run", tiny.tiny(router={"name": "switch"}, **sections), 1)
    assert int(state.step) == 1
    assert all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))


WRONG_PLANS = [
    ([], ["--topology"]),
    (["--topology=v9:2x2"], ["unknown topology 'v9:2x2'"]),
    (["--topology=v5e:2x4x2"], ["3 sides", "v5e has 2"]),
    (["--topology=v5e:2x4", "--config.mesh.expert=3"], ["8 devices are not divisible by 3"]),
    (["--topology=v5e:2x4", "--config.mesh.fsdp=4", "--config.mesh.data=4"], ["needs 16", "are 8"]),
    (["--topology=v5e:2x4", "--config.data.batch=12"], ["batch 12", "expert = 8"]),
    (["--topology=h100:1x4", "--config.mesh.tensor=4"], ["=2 is not divisible by", "tensor=4"]),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG_PLANS, ids=[str(a) for a, _ in WRONG_PLANS])
def test_bad_input_of_plan(moejax, experiment, compiled, arguments, words):
    before = len(compiled)
    assert_refused(moejax("plan", experiment, *arguments), *words)
    assert len(compiled) == before


def test_plan_without_its_compiler_says_how_to_get_it(moejax, experiment, monkeypatch):
    find = importlib.util.find_spec
    without = lambda name, *a: None if name == "libtpu" else find(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    answer = moejax("plan", experiment, "--topology=v5e:4x4")
    assert_refused(answer, "pip install 'moejax[tpu]'")


def test_plan_of_gpus_and_of_what_does_not_fit(moejax, experiment, tmp_path):
    files = tmp_path / "plan.json", tmp_path / "plan.html"
    to = [f"--{path.suffix[1:]}={path}" for path in files]
    code, out, err = moejax("plan", experiment, "--topology=h100:1x8", *to)
    assert (code, err) == (0, "")
    assert "by formula" in out and "note: analytic" in out
    assert json.loads(files[0].read_text())["devices"] == 8
    assert f"{experiment} on h100:1x8" in files[1].read_text()
    large = ["--config.model.layers=64", "--config.model.dim=16384", "--config.moe.ffn=65536"]
    code, out, err = moejax("plan", experiment, "--topology=h100:1x8", *large)
    assert (code, out) == (1, "") and len(err.splitlines()) == 1
    assert err.startswith("error: ") and "GiB needed of 74.51 GiB" in err and "raise mesh." in err
    code, out, err = moejax(
        "plan", experiment, "--topology=h100:1x8", *large, "--search", "--tries=2"
    )
    assert code == 1 and out.startswith("tried") and "none of 2 tries fits h100:1x8" in err


def test_generate_writes_on(moejax, out, tmp_path):
    run, prompts = out / "switch/seed0", tmp_path / "prompts"
    prompts.write_text("class A\nThe\n")
    before = tiny.snapshot(run)
    code, text, err = moejax(
        *("generate", run, "--prompt=def f", f"--prompts={prompts}", "--tokens=4"),
        *(f"--trace={tmp_path / 'trace'}", f"--view={tmp_path / 'page.html'}"),
    )
    assert code == 0, err
    assert text.startswith("--- 1\ndef f") and "--- 2\nclass A" in text and "--- 3\nThe" in text
    assert "tokens/s" in err.splitlines()[-1]
    assert open_trace(tmp_path / "trace").read().document_T[-1] == 2
    assert "switch/seed0, step 4 wrote" in (tmp_path / "page.html").read_text()
    assert tiny.snapshot(run) == before


@pytest.mark.parametrize(
    ("flags_", "words"),
    [
        ([], ["--prompt=TEXT or --prompts=FILE"]),
        (["--prompt=a", "--prompt="], ["prompt 2 of 2 is empty"]),
        (["--prompts=NUL"], ["prompt 1 of 1 holds a NUL character at byte 1"]),
        (["--prompts=NONE"], ["No such file"]),
        (["--prompt=a", "--top_p=2"], ["top_p=2.0 must be in (0, 1]"]),
        (["--prompt=a", "--tokens=0"], ["--tokens=0 must be at least 1"]),
        (["--prompt=abc", "--tokens=30"], ["3 tokens and 30 new ones", "32 positions"]),
        (["--prompt=" + "a" * 32], ["32 tokens and 1 new ones", "shorten the prompt"]),
    ],
)
def test_generate_refuses_in_one_line(moejax, out, tmp_path, flags_, words):
    (tmp_path / "nul").write_bytes(b"a\0b")
    paths = {"NUL": str(tmp_path / "nul"), "NONE": str(tmp_path / "none")}
    for name, path in paths.items():
        flags_ = [flag.replace(name, path) for flag in flags_]
    assert_refused(moejax("generate", out / "switch/seed0", *flags_), *words)


def test_view_writes_a_page_and_refuses_a_model_that_routes_nothing(moejax, out, tmp_path):
    page = tmp_path / "view.html"
    code, text, err = moejax("view", out / "switch/seed0", "--prompt=def f(x):", f"--out={page}")
    assert code == 0, err
    assert text.startswith(f"{page}: 9 tokens")
    assert "switch/seed0, step 4</title>" in page.read_text()
    answer = moejax("view", out / "dense/seed0", f"--out={page}")
    assert_refused(answer, "no layer of this model routes")
