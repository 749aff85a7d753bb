"""The smallest model and corpus that still train: what the tests of training share."""

import functools
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.config import Config, default_config, override
from moejax.data import TextDataset, open_dataset
from moejax.training.checkpoint import Checkpoints
from moejax.training.optimizer import make_optimizer
from moejax.training.state import TrainState, init_state

ROOT = Path(__file__).parent.parent
VOCABULARY = 256

SIZES = {
    "model.layers": 2,
    "model.dim": 16,
    "model.heads": 2,
    "model.ffn": 32,
    "moe.experts": 4,
    "moe.ffn": 32,
    "moe.dispatch": "gather",
    "data.sequence": 32,
    "data.batch": 8,
    "data.max_documents": 40,
    "data.validation": 0.2,
    "optimizer.warmup": 2,
    "train.steps": 12,
    "train.eval_rows": 16,
}


@functools.cache
def data_dir() -> str:
    """One prepared corpus for the whole session."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="moejax-tests-"))
    return _KEPT[-1].name


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def tiny(**sections: dict[str, Any]) -> Config:
    """A tiny config with sections changed: tiny(router={"name": "switch"}, train={"steps": 4})."""
    changes = {f"{s}.{key}": value for s, keys in sections.items() for key, value in keys.items()}
    tree = override(default_config(), {**SIZES, "data.data_dir": data_dir(), **changes})
    return Config.from_dict(tree)


LOSS_FREE = {"name": "loss_free", "k": 2, "bias_rate": 1e-2}
# The arms of the first comparison. Groups of sequences, so that no split of the batch changes who
# drops.
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"moe": {"experts": 0}},
    "switch": {
        "router": {"name": "switch"},
        "moe": {"capacity_factor": 1.25, "groups": "sequence"},
        "balance": {"load_balance": 0.01},
    },
    "gshard": {
        "router": {"name": "gshard_top2", "second": "always"},
        "moe": {"capacity_factor": 1.0, "groups": "sequence"},
        "balance": {"load_balance_top1": 0.01},
    },
    "expert_choice": {
        "router": {"name": "expert_choice", "k": 2},
        "moe": {"capacity_factor": 1.0, "groups": "sequence"},
    },
    "loss_free": {
        "router": LOSS_FREE,
        "moe": {"dispatch": "dropless"},
        "balance": {"router_z": 0.001},
    },
}


@functools.cache
def dataset() -> TextDataset:
    return open_dataset(tiny().data, progress=False)


def abstract_state(config: Config) -> TrainState:
    """The state of a config as shapes on the first device; compiles nothing."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    shapes = jax.eval_shape(
        lambda: init_state(0, config=config, vocab_size=VOCABULARY, optimizer=optimizer)
    )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), shapes)


def saved_state(workdir: Path, config: Config, step: int | None = None) -> TrainState:
    checkpoints = Checkpoints(workdir, read_only=True)
    state, _ = checkpoints.restore(abstract_state(config), step)
    checkpoints.close()
    return jax.device_get(state)


def copied(tree: Any) -> Any:
    """A copy on the host that no donated buffer can change."""
    return jax.tree.map(lambda a: np.array(a, copy=True), tree)


def assert_identical(left: Any, right: Any) -> None:
    """Every leaf bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def environment(cache: Path | None = None, devices: int = 1) -> dict[str, str]:
    """Of a process on simulated devices that compiles fast, as conftest.py says, or hardly at all
    with a cache."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    env["XLA_FLAGS"] = os.environ["XLA_FLAGS"]
    if cache is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return env


def start(*arguments: str, cache: Path | None = None, devices: int = 1) -> subprocess.Popen[str]:
    """A real process: `python ARGUMENTS` in the repository."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(cache, devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(
    processes: int, *command: str, cache: Path | None = None, devices: int = 1
) -> list[subprocess.Popen[str]]:
    """`python COMMAND` on so many processes that meet here, of so many devices each."""
    if processes == 1:
        return [start(*command, cache=cache, devices=devices)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command += (f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}")
    return [
        start(*command, f"--process_id={i}", cache=cache, devices=devices) for i in range(processes)
    ]


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> list[tuple[str, str]]:
    """Standard output and error of each, once all have ended with this exit code."""
    said = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said
