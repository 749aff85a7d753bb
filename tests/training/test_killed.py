"""A run that is killed and resumed ends bit for bit where it would have ended."""

import json
import random
import signal
import time
from collections import Counter

import pytest

from moejax.config import Config
from moejax.training.records import read_records
from tests import tiny
from tests.training import experiment

EXPERIMENT = "tests/training/experiment.py"


def config():
    return Config.from_dict(experiment.get_config())


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def training(workdir, cache=None):
    return tiny.start(
        "-m",
        "moejax.train",
        f"--config={EXPERIMENT}",
        f"--workdir={workdir}",
        f"--config.data.data_dir={tiny.data_dir()}",
        cache=cache,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    out, _ = finish(training(workdir, cache))
    assert "bits per byte" in out
    return workdir


def stop_at(process, workdir, step, number):
    """Send a signal once a record of that step or a later one is there, and a checkpoint."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        reached = any(r["step"] >= step for r in read_records(workdir / "metrics.jsonl"))
        if reached and latest(workdir):
            process.send_signal(number)
            return
        time.sleep(0.003)
    pytest.fail(f"no step {step}: {process.communicate()}")


def assert_same_run(workdir, reference):
    assert_same_state(workdir, reference)
    assert [timeless(r) for r in read_records(workdir / "metrics.jsonl")] == [
        timeless(r) for r in read_records(reference / "metrics.jsonl")
    ]
    ours, theirs = (json.loads((w / "summary.json").read_text()) for w in (workdir, reference))
    assert ours["bpb"] == theirs["bpb"]


def assert_same_state(workdir, reference):
    ours, theirs = (tiny.saved_state(w, config()) for w in (workdir, reference))
    assert ours.step == experiment.STEPS
    tiny.assert_identical(ours, theirs)


def timeless(record):
    return {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_s", "mfu")}


def test_an_uninterrupted_run_logs_every_due_step_once(uninterrupted):
    steps = experiment.STEPS
    kinds = Counter((r["kind"], r["step"]) for r in read_records(uninterrupted / "metrics.jsonl"))
    logged = {("train", s) for s in range(1, steps + 1) if s % 3 == 0 or s == steps}
    evaluated = {("eval", s) for s in range(1, steps + 1) if s % 7 == 0 or s == steps}
    assert set(kinds.values()) == {1}
    assert {key for key in kinds if key[0] != "alarm"} == logged | evaluated


def test_killed_at_a_random_step_and_resumed_is_bit_identical(uninterrupted, tmp_path, cache):
    workdir, step = tmp_path / "killed", random.SystemRandom().randrange(6, 45)
    process = training(workdir, cache)
    stop_at(process, workdir, step, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()
    assert latest(workdir) < experiment.STEPS
    _, err = finish(training(workdir))  # compiles again, as on another day
    assert "resumed from step" in err
    assert_same_run(workdir, uninterrupted)


def test_terminated_saves_exits_cleanly_and_resumes_bit_identical(uninterrupted, tmp_path, cache):
    workdir = tmp_path / "terminated"
    process = training(workdir, cache)
    stop_at(process, workdir, 8, signal.SIGTERM)
    _, err = finish(process)
    (line,) = [line for line in err.splitlines() if line.startswith("saved at step")]
    step = int(line.split()[3])
    assert f"saved at step {step} of {experiment.STEPS}; the same command resumes" == line
    assert latest(workdir) == step
    assert not (workdir / "summary.json").exists()
    _, err = finish(training(workdir, cache))
    assert f"resumed from step {step}" in err
    assert_same_run(workdir, uninterrupted)


def latest(workdir):
    """The last step that is saved whole; 0 = none."""
    return max((int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()), default=0)


def test_a_finished_run_started_again_changes_nothing_that_counts(uninterrupted, cache):
    before = {p: tiny.snapshot(uninterrupted)[p] for p in ("metrics.jsonl", "config.json")}
    finish(training(uninterrupted, cache))
    after = tiny.snapshot(uninterrupted)
    assert {path: after[path] for path in before} == before


def test_evaluate_prints_the_bits_per_byte_that_the_run_ended_with(uninterrupted, cache):
    before = tiny.snapshot(uninterrupted)
    arguments = ("-m", "moejax.evaluate", str(uninterrupted), "--rows=16")
    out, _ = finish(tiny.start(*arguments, cache=cache))
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert f"bits per byte {summary['bpb']:.4f} on" in out
    for name, bpb in summary["eval"]["bpb_domain"].items():
        assert f"{name:<12}{bpb:.4f}" in out
    assert tiny.snapshot(uninterrupted) == before
