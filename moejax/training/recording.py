"""A run's routing on disk: WORKDIR/routing, one file for some steps, in constant memory.

FIRST-LAST.npz holds the steps from FIRST to LAST: expert_NBLSR (uint8, or uint16 where there are
more than 255 experts; E = none), weight_NBLSR (float32) and position_N, where in the data stream
each step's rows end. meta.json says what a run must share to be given them.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax.config import Config
from moejax.routing import Recorded

STEPS_A_FILE = 16


class ReplayBatch(NamedTuple):
    """A `Batch` with another run's routing of its rows, so that whatever cuts rows cuts both.

    recorded: arrays [B, L, S, R].
    """

    tokens_BS: Any
    targets_BS: Any
    segment_BS: Any
    position_BS: Any
    valid_BS: Any
    domain_B: Any
    recorded: Recorded


def index_dtype(num_experts: int) -> Any:
    """The smallest dtype that holds 0 .. E."""
    return np.uint8 if num_experts <= 255 else np.uint16


def _shared(config: Config) -> dict[str, int]:
    """What a recording and its reader must agree on, besides the text."""
    return {
        "data.batch": config.data.batch,
        "data.sequence": config.data.sequence,
        "MoE layers": config.moe_layers,
        "moe.experts": config.moe.experts,
    }


class Recorder:
    """Writes the routing of each step. What is later than the newest checkpoint is made again."""

    def __init__(self, workdir: Path, config: Config, seed: int, text: str, resume: int) -> None:
        """seed: of the data's order; text: its fingerprint; resume: the step the run stands at."""
        self._folder = workdir / "routing"
        self._folder.mkdir(exist_ok=True)
        for (first, _), path in _files(self._folder).items():
            if first > resume:
                path.unlink()
        meta = {**_shared(config), "seed": seed, "text": text}
        (self._folder / "meta.json").write_text(json.dumps(meta, indent=2))
        self._first = 0
        self._steps: list[tuple[int, Any]] = []

    def add(self, step: int, position: int, recorded: Recorded) -> None:
        """Take a step's arrays [B, L, S, R], perhaps still being computed."""
        if self._steps:  # the step before this one is done: off the device with it
            before, arrays = self._steps[-1]
            self._steps[-1] = before, jax.device_get(arrays)
        else:
            self._first = step
        self._steps.append((position, recorded))
        if len(self._steps) == STEPS_A_FILE:
            self.flush()

    def flush(self) -> None:
        """Write the steps taken since the last file."""
        if not self._steps:
            return
        arrays = [jax.device_get(recorded) for _, recorded in self._steps]
        last = self._first + len(arrays) - 1
        partial = self._folder / "partial"
        with partial.open("wb") as file:
            np.savez(
                file,
                expert_NBLSR=np.stack([a.expert_TR for a in arrays]),
                weight_NBLSR=np.stack([a.weight_TR for a in arrays]),
                position_N=np.array([position for position, _ in self._steps], np.int64),
            )
        partial.replace(self._folder / f"{self._first:08d}-{last:08d}.npz")
        self._steps = []


class Recording:
    """Reads what a Recorder wrote, one file at a time.

    seed: of the recorded data's order. width: R.
    """

    def __init__(self, workdir: Path) -> None:
        """Raises ValueError where the run in this folder recorded nothing."""
        self._workdir, folder = workdir, workdir / "routing"
        self._files = _files(folder) if folder.is_dir() else {}
        if not self._files:
            raise ValueError(
                f"train.replay={workdir} holds no recorded routing; train that run with "
                "train.record_routing=True"
            )
        self._meta = json.loads((folder / "meta.json").read_text())
        self.seed: int = self._meta["seed"]
        self._span, self._arrays = (0, 0), self._load(next(iter(self._files.values())))
        self.width: int = self._arrays["expert_NBLSR"].shape[-1]

    def check(self, config: Config) -> None:
        """Raises ValueError where a config has other sizes, or trains for more steps."""
        for what, mine in _shared(config).items():
            if self._meta[what] != mine:
                raise ValueError(
                    f"train.replay={self._workdir} was recorded with {what}={self._meta[what]}, "
                    f"this run has {mine}"
                )
        last = max(last for _, last in self._files)
        if last < config.train.steps:
            raise ValueError(
                f"train.replay={self._workdir} was recorded up to step {last}, this run has "
                f"train.steps={config.train.steps}"
            )

    def check_text(self, fingerprint: str) -> None:
        """Raises ValueError where the recorded run read other text."""
        if self._meta["text"] != fingerprint:
            raise ValueError(
                f"train.replay={self._workdir} was recorded on text of fingerprint "
                f"{self._meta['text']}, this run reads {fingerprint}"
            )

    def step(self, step: int, position: int, rows: slice | np.ndarray) -> Recorded:
        """These rows of a step's arrays, [B, L, S, R].

        Raises:
          ValueError: the step is missing, or its rows were others.
        """
        if not self._span[0] <= step <= self._span[1]:
            spans = [span for span in self._files if span[0] <= step <= span[1]]
            if not spans:
                raise ValueError(f"train.replay={self._workdir}: step {step} was not recorded")
            self._span = spans[0]
            self._arrays = self._load(self._files[self._span])
        at = step - self._span[0]
        there = int(self._arrays["position_N"][at])
        if there != position:
            raise ValueError(
                f"train.replay={self._workdir}: step {step} was recorded on the rows that end at "
                f"{there}, this run reads those that end at {position}"
            )
        arrays: tuple[Any, ...] = tuple(
            self._arrays[name][at, rows] for name in ("expert_NBLSR", "weight_NBLSR")
        )
        return Recorded(*arrays)

    @staticmethod
    def _load(path: Path) -> dict[str, np.ndarray]:
        with np.load(path) as arrays:
            return dict(arrays)


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    """(first, last) -> file, in order."""
    found = {}
    for path in sorted(folder.glob("*-*.npz")):
        first, last = path.stem.split("-")
        found[int(first), int(last)] = path
    return found
