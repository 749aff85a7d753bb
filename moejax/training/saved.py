"""A run that was trained, opened again to look at: its config, text, program and state."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from moejax.config import Config
from moejax.config.older import modern
from moejax.data import TextDataset, open_dataset
from moejax.model import Transformer
from moejax.training.checkpoint import Checkpoints
from moejax.training.program import Program, build_program
from moejax.training.state import TrainState, make_graph


class SavedRun(NamedTuple):
    """A run at one of its checkpoints.

    Attributes:
      config: as it was trained.
      dataset: the text, and the tokeniser.
      program: without its training step.
      state: at the checkpoint, on the devices that are here.
    """

    config: Config
    dataset: TextDataset
    program: Program
    state: TrainState

    def model(self) -> Transformer:
        """The model as an object, routing as evaluation does: capacity and groups are those of
        `config.moe.evaluation()`."""
        config = dataclasses.replace(self.config, moe=self.config.moe.evaluation())
        return nnx.merge(make_graph(config, self.dataset.vocab_size), self.state.params)


def read_config(workdir: Path) -> Config:
    """The config of the run in a folder. Raises FileNotFoundError where there is none."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} holds no run: there is no config.json")
    return Config.from_dict(modern(json.loads(path.read_text())))


def open_run(
    workdir: Path, step: int | None = None, *, config: Config | None = None, progress: bool = True
) -> SavedRun:
    """A run at a checkpoint.

    Args:
      workdir: of the run.
      step: of the checkpoint; None = the newest.
      config: the run's own with other text or rows; None = as it is.
      progress: show on stderr that text is prepared.

    Raises:
      FileNotFoundError: no run, or no such checkpoint.
      ValueError: a checkpoint of other sizes, or text that does not fit.
    """
    workdir = Path(workdir)
    config = read_config(workdir) if config is None else config
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        dataset = open_dataset(config.data, progress=progress)
        program = build_program(config, dataset.vocab_size, len(dataset.domains), training=False)
        state, _ = checkpoints.restore(program.abstract_state, step)
    finally:
        checkpoints.close()
    return SavedRun(config, dataset, program, state)


def saved_steps(workdir: Path) -> list[int]:
    """The steps of a run's checkpoints, oldest first. Raises FileNotFoundError where it has
    none."""
    checkpoints = Checkpoints(Path(workdir), read_only=True)
    try:
        return checkpoints.steps
    finally:
        checkpoints.close()
