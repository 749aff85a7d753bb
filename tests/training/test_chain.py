"""Runs that build on each other, compared on two processes, are those of one process."""

import dataclasses
import json

import numpy as np
import pytest

from moejax.compare import plan
from moejax.config import MeshConfig
from moejax.tracing import open_trace
from moejax.training.loop import train
from moejax.training.records import read_records
from tests import tiny
from tests.training import chain

HERE = "tests/training/chain.py"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison on two processes of one device, and what they said."""
    out = tmp_path_factory.mktemp("compared") / "out"
    data = f"--config.data.data_dir={tiny.data_dir()}"
    command = ("-m", "moejax.compare", f"{HERE}:{out}", f"--out={out}", data)
    return out, tiny.finish(tiny.together(2, *command))


@pytest.fixture(scope="module")
def alone(compared, tmp_path_factory):
    """The same runs by this process on eight devices, from the same dense run."""
    out, here = compared[0], tmp_path_factory.mktemp("alone")
    base = chain.get_config()
    base.data.data_dir = tiny.data_dir()
    configs = plan(chain.get_suite(str(out)), base, ["sparse", "follower"])
    for name, config in configs.items():
        wide = dataclasses.replace(config, mesh=MeshConfig(data=4, expert=2))
        if wide.train.replay:
            follow = dataclasses.replace(wide.train, replay=str(here / "sparse/seed0"))
            wide = dataclasses.replace(wide, train=follow)
        train(wide, here / name, quiet=True)
    return here


def losses(workdir) -> list[float]:
    return [r["loss"] for r in read_records(workdir / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.parametrize("run", ["sparse/seed0", "follower/seed0"])
def test_each_run_is_that_of_one_process(compared, alone, run: str) -> None:
    ours, theirs = losses(compared[0] / run), losses(alone / run)
    assert len(ours) == 4
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_the_trace_is_that_of_one_process(compared, alone) -> None:
    mine, other = (open_trace(out / "sparse/seed0/trace").read() for out in (compared[0], alone))
    assert len(mine) > 4 * 200 and mine.meta == other.meta
    for name, column in mine.columns():
        if column.dtype == np.float32:
            np.testing.assert_allclose(column, getattr(other, name), rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(column, getattr(other, name))


def test_one_process_writes_and_reports(compared) -> None:
    out, ((report, progress), (silent, other)) = compared
    assert f"report: {out / 'report.html'}" in report and (out / "report.html").is_file()
    assert "[3/3] follower/seed0" in progress
    assert "report" not in silent and "/3]" not in other
    summary = json.loads((out / "follower/seed0/summary.json").read_text())
    assert summary["step"] == 4
