"""Several real processes train one run: the same numbers as one process on the same mesh."""

import os
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from moejax.config import Config, MeshConfig
from moejax.sharding import local_rows, make_mesh
from moejax.training.processes import HEARTBEAT, LEAVING, join
from moejax.training.records import read_records
from tests import tiny
from tests.tiny import finish
from tests.training import experiment
from tests.training.test_killed import latest, stop_at, timeless

# Four devices. Of two processes each has one half of the experts and of the batch; of four each has
# a quarter of the experts' weights, and pairs of them read the same rows.
MESH = ("--config.mesh.expert=2", "--config.mesh.tensor=2")
SHORT = {"steps": 24, "log_every": 2, "eval_every": 24, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def start(workdir, *flags, cache=None, processes=1, devices=4):
    """`moejax train` on so many processes, of so many devices each."""
    command = ["-m", "moejax.train", "--config=tests/training/experiment.py", *flags]
    command += [f"--config.train.{key}={value}" for key, value in SHORT.items()]
    command += [f"--workdir={workdir}", f"--config.data.data_dir={tiny.data_dir()}"]
    return tiny.together(processes, *command, cache=cache, devices=devices)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, cache):
    """A run of two processes, and what they said."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    return workdir, finish(start(workdir, *MESH, cache=cache, processes=2, devices=2))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """The same run on one process of four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(start(workdir, *MESH, cache=cache))
    return workdir


def assert_same_run(workdir, other, tolerance=0.0):
    """Final states and all records; bit for bit without a tolerance."""
    config = Config.from_dict(experiment.get_config())
    states = [tiny.saved_state(folder, config) for folder in (workdir, other)]
    assert states[0].step == SHORT["steps"]
    records = [
        [timeless(r) for r in read_records(folder / "metrics.jsonl")] for folder in (workdir, other)
    ]
    if not tolerance:
        tiny.assert_identical(*states)
        assert records[0] == records[1]
        return
    for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)
    losses = [[r["loss"] for r in each if r["kind"] == "train"] for each in records]
    np.testing.assert_allclose(*losses, rtol=0, atol=tolerance)


def test_two_processes_train_as_one_and_one_of_them_writes(pair, alone):
    workdir, said = pair
    # Sums across processes are added in another order than those inside one.
    assert_same_run(workdir, alone, tolerance=1e-5)
    assert "bits per byte" in said[0][0] and "step 24/24" in said[0][1]
    assert "bits per byte" not in said[1][0] and "step" not in said[1][1]
    assert {path.name for path in workdir.iterdir()} == {path.name for path in alone.iterdir()}
    assert len(list((workdir / "tensorboard").iterdir())) == 1


def test_one_of_two_killed_and_both_started_again_is_the_same_run(pair, tmp_path, cache):
    workdir = tmp_path / "run"
    both = start(workdir, *MESH, cache=cache, processes=2, devices=2)
    stop_at(both[1], workdir, 5, signal.SIGKILL)
    began = time.monotonic()
    both[0].communicate(timeout=120)
    assert both[0].returncode != 0, "it went on alone"
    assert time.monotonic() - began < HEARTBEAT + LEAVING
    both[1].communicate()
    assert 0 < latest(workdir) < SHORT["steps"]
    said = finish(start(workdir, *MESH, cache=cache, processes=2, devices=2))
    assert "resumed from step" in said[0][1] and "resumed" not in said[1][1]
    assert_same_run(workdir, pair[0])


def test_four_told_through_one_save_together_and_one_goes_on(alone, tmp_path, cache):
    workdir, other = tmp_path / "run", tmp_path / "other"
    four = start(workdir, *MESH, cache=cache, processes=4, devices=1)
    stop_at(four[2], workdir, 5, signal.SIGTERM)
    said = finish(four)
    (line,) = [line for line in said[0][1].splitlines() if line.startswith("saved at step")]
    assert line == f"saved at step {latest(workdir)} of 24; the same command resumes"
    assert not any("saved at step" in err for _, err in said[1:])
    assert not (workdir / "summary.json").exists()

    shutil.copytree(workdir, other)
    for folder, flags, devices in ((workdir, MESH, 4), (other, (), 2)):
        ((_, err),) = finish(start(folder, *flags, cache=cache, devices=devices))
        assert "resumed from step" in err
    assert_same_run(workdir, alone)  # one device a process: the sums are one process's, bit for bit
    assert_same_run(other, alone, tolerance=1e-5)  # two devices that cut the batch


def test_slurm_says_who_they_are_and_different_runs_do_not_start(tmp_path, cache, monkeypatch):
    slurm = {"JOB_ID": os.getpid(), "STEP_NODELIST": "localhost", "NTASKS": 2, "LOCALID": 0}
    pair = []
    for rank in range(2):
        for name, value in {**slurm, "PROCID": rank}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        seed = f"--config.train.seed={rank}"
        pair += start(tmp_path / "run", seed, cache=cache, devices=1)
    for _, err in finish(pair, code=2):
        assert err.splitlines()[-1].startswith("error: process 1 of 2 has config")
        assert err.count("error") == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_fewer_processes_than_asked_is_one_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = (f"--coordinator={address}", "--num_processes=3", "--process_id=0", "--wait=1")
    ((_, err),) = finish(start(tmp_path / "run", *flags), code=2)
    assert err == (
        f"error: not all of --num_processes=3 processes came to {address} within --wait=1 s\n"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 2}, "--num_processes=2 needs --coordinator, --process_id too"),
        (
            {"coordinator": "a:1", "process_id": 3},
            "--coordinator=a:1, --process_id=3 needs --num_processes too",
        ),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "--process_id=2 is not one of --num_processes=2",
        ),
    ],
)
def test_half_given_flags_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        join(**given)


def test_rows_are_those_of_this_process_s_devices():
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    assert local_rows(6, mesh).tolist() == [0, 1, 2, 3, 4, 5]
