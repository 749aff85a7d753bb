"""A run small enough to train in seconds: two layers, four experts, forty documents of real
text."""

import functools
import tempfile
from typing import Any

import jax
import numpy as np

from moejax.config import Config, default_config, override
from moejax.data import Batch, TextDataset, open_dataset
from moejax.training.program import Program, build_program

_DATA = tempfile.TemporaryDirectory(prefix="moejax-tests-")
DATA_DIR = _DATA.name  # prepared once for all tests of a session; gone at its end

SETTINGS: dict[str, Any] = {
    "model.layers": 2,
    "model.dim": 16,
    "model.heads": 2,
    "model.ffn": 32,
    "moe.experts": 4,
    "data.data_dir": DATA_DIR,
    "data.max_documents": 40,
    "data.validation": 0.2,
    "data.sequence": 32,
    "data.batch": 8,
    "optimizer.warmup": 2,
    "train.steps": 8,
    "train.log_every": 1,
    "train.eval_every": 4,
    "train.eval_rows": 16,
    "train.checkpoint_every": 4,
}


def tiny_config(router: str = "topk", **changes: Any) -> Config:
    """`changes` are dotted with __: moe__groups='sequence'."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return Config.from_dict(
        override(default_config(), {"router.name": router, **SETTINGS, **dotted})
    )


def experiment(router: str = "topk", **changes: Any) -> str:
    """The same config as the source of an experiment file."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    settings = {"router.name": router, **SETTINGS, **dotted}
    return (
        "from moejax.config import default_config, override\n\n"
        f"SETTINGS = {settings!r}\n\n\n"
        "def get_config(scale: str = 'smoke'):\n"
        "    return override(default_config(), SETTINGS)\n"
    )


@functools.cache
def text() -> TextDataset:
    return open_dataset(tiny_config().data, progress=False)


def program(config: Config) -> Program:
    """Compiled once for all tests that ask for the same config."""
    return build_program(config, text().vocab_size, len(text().domains))


def batch(index: int = 0) -> Batch:
    rows = tiny_config().data.batch
    return text().train_batch(index * rows, seed=0)


def bits(tree: Any) -> list[tuple[str, bytes]]:
    """Every array of a tree with its path, to the last bit."""
    leaves = jax.tree.leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), np.asarray(leaf).tobytes()) for path, leaf in leaves]
