"""A training run's trace, WORKDIR/trace: written while it trains, and read to be replayed."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax.config import Config
from moejax.data import Batch, TextDataset
from moejax.routing import Decisions, Recorded
from moejax.tracing import Part, TraceMeta, TraceWriter, open_trace, trace_of_rows

FOLDER = "trace"


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


def trace_meta(config: Config, dataset: TextDataset) -> TraceMeta:
    """What all parts of a run's trace share. Raises ValueError where no layer routes."""
    moe = config.moe
    if not moe.experts or moe.slots:
        raise ValueError(
            f"no layer of this model routes tokens to experts (moe.experts={moe.experts}, "
            f"moe.slots={moe.slots}): there is nothing to trace"
        )
    first = moe.first_dense + moe.every - 1
    return TraceMeta(
        experts=moe.experts,
        layers=tuple(range(first, config.model.layers, moe.every)),
        domains=tuple(dataset.domains),
        vocabulary=dataset.vocab_size,
        tokenizer=dataset.tokenizer.identity,
    )


def _shared(config: Config) -> dict[str, int]:
    """What a trace and the run that replays it must agree on, besides the text."""
    return {
        "data.batch": config.data.batch,
        "data.sequence": config.data.sequence,
        "MoE layers": config.moe_layers,
        "moe.experts": config.moe.experts,
    }


class Recorder:
    """Writes the trace of every `train.trace_every`-th step. What is later than the newest
    checkpoint is made again."""

    def __init__(
        self, workdir: Path, config: Config, dataset: TextDataset, seed: int, resume: int
    ) -> None:
        """seed: of the data's order; resume: the step the run stands at."""
        self._every, self._meta = config.train.trace_every, trace_meta(config, dataset)
        self._writer = TraceWriter(
            workdir / FOLDER,
            self._meta,
            every=self._every,
            resume=resume,
            extra={"shared": _shared(config), "seed": seed, "text": dataset.fingerprint},
        )
        self._pending: tuple[int, int, tuple[Batch, Decisions]] | None = None

    def add(self, step: int, position: int, traced: tuple[Batch, Decisions]) -> None:
        """Take a step's rows and decisions [L, B, S, ...], perhaps still being computed; write
        those of the step before, which is done."""
        self._settle()
        if step % self._every == 0:
            self._pending = step, position, traced

    def flush(self) -> None:
        """Write all that was taken."""
        self._settle()
        self._writer.flush()

    def _settle(self) -> None:
        if self._pending is None:
            return
        (step, position, traced), self._pending = self._pending, None
        batch, decisions = jax.device_get(traced)
        tokens_B = batch.valid_BS.sum(1)
        trace = trace_of_rows(self._meta, batch, decisions)
        self._writer.add(Part(step, trace, tokens_B, position))


class Recording:
    """Reads what a Recorder wrote, for a replay.

    seed: of the traced data's order. width: R.
    """

    def __init__(self, workdir: Path) -> None:
        """Raises ValueError where the run in this folder was not traced at every step."""
        self._workdir = workdir
        try:
            self._trace = open_trace(workdir / FOLDER)
        except FileNotFoundError:
            raise ValueError(
                f"train.replay={workdir} holds no trace; train that run with train.trace_every=1"
            ) from None
        every = self._trace.every
        if every != 1:
            raise ValueError(
                f"train.replay={workdir} was traced at one step in {every} (train.trace_every="
                f"{every}); a replay needs all of them: train that run with train.trace_every=1"
            )
        self.seed: int = self._trace.info["seed"]
        self.width: int = self._part(1).trace.expert_TLR.shape[-1]

    def check(self, config: Config) -> None:
        """Raises ValueError where a config has other sizes, or trains for more steps."""
        for what, mine in _shared(config).items():
            theirs = self._trace.info["shared"][what]
            if theirs != mine:
                raise ValueError(
                    f"train.replay={self._workdir} was traced with {what}={theirs}, this run has "
                    f"{mine}"
                )
        if self._trace.last < config.train.steps:
            raise ValueError(
                f"train.replay={self._workdir} was traced up to step {self._trace.last}, this run "
                f"has train.steps={config.train.steps}"
            )

    def check_text(self, fingerprint: str) -> None:
        """Raises ValueError where the traced run read other text."""
        theirs = self._trace.info["text"]
        if theirs != fingerprint:
            raise ValueError(
                f"train.replay={self._workdir} was traced on text of fingerprint {theirs}, this "
                f"run reads {fingerprint}"
            )

    def step(
        self, step: int, position: int, rows: slice | np.ndarray, valid_BS: np.ndarray
    ) -> Recorded:
        """These rows of a step's routing, [B, L, S, R]. valid_BS: which of their tokens are real.

        Raises:
          ValueError: the step is missing, or its rows were others.
        """
        part = self._part(step)
        if part.position != position:
            raise ValueError(
                f"train.replay={self._workdir}: step {step} was traced on the rows that end at "
                f"{part.position}, this run reads those that end at {position}"
            )
        mine = np.zeros(len(part.tokens_B), bool)
        mine[rows] = True
        mine_T = np.repeat(mine, part.tokens_B)
        trace, shape = part.trace, valid_BS.shape
        nowhere = trace.meta.experts

        def in_rows(a_TLR: np.ndarray, nothing: int) -> np.ndarray:
            a_BSLR = np.full((*shape, *a_TLR.shape[1:]), nothing, a_TLR.dtype)
            a_BSLR[valid_BS] = a_TLR[mine_T]
            return np.moveaxis(a_BSLR, 2, 1)

        arrays: tuple[Any, Any] = (in_rows(trace.expert_TLR, nowhere), in_rows(trace.weight_TLR, 0))
        return Recorded(*arrays)

    def _part(self, step: int) -> Part:
        try:
            return self._trace.part(step)
        except KeyError:
            problem = "was not traced"
        except ValueError as error:
            problem = f"cannot be read: {error}"
        raise ValueError(f"train.replay={self._workdir}: step {step} {problem}")
