"""A trace on disk: a folder of columns, written and read a file at a time, in constant memory.

FIRST-LAST.npz holds the parts from number FIRST to LAST: training steps, or batches of an
evaluation. In it lies each column of `Trace` under its own name in the smallest dtype that holds it
(dropped_TLR as bits), and for each part N: number_N; rows_N, the rows of its batch; tokens_R, the
tokens of each row; position_N, where in the data stream its rows end. meta.json holds `TraceMeta`,
the last part's number and what the writer adds. A file is whole or absent; documents are numbered
from 0 in each, and the reader goes on counting.
"""

import dataclasses
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.tracing.schema import Trace, TraceMeta, concatenate, index_dtype

log = logging.getLogger(__name__)

TOKENS_A_FILE = 32_768
META = "meta.json"


class Part(NamedTuple):
    """One step, or one batch, of a trace.

    Attributes:
      number: of the step or the batch.
      trace: its tokens, row by row.
      tokens_B: how many tokens each row has.
      position: where in the data stream its rows end; 0 = unknown.
    """

    number: int
    trace: Trace
    tokens_B: np.ndarray
    position: int = 0


class TraceWriter:
    """Writes a trace. Holds the tokens of one file, however long the trace is."""

    def __init__(
        self,
        folder: Path,
        meta: TraceMeta,
        *,
        every: int = 1,
        resume: int = 0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """every: the distance between the numbers of parts. resume: parts above this number are
        removed, they will come again. extra: what else a reader should know, plain values."""
        self._folder, self._every = Path(folder), every
        self._folder.mkdir(parents=True, exist_ok=True)
        for (_, last), path in files_in(self._folder).items():
            if last > resume:
                path.unlink()
        self._meta = {"trace": dataclasses.asdict(meta), "every": every, **(extra or {})}
        self._parts: list[Part] = []
        self._write_meta(resume)

    def add(self, part: Part) -> None:
        """Take the next part; parts come in the order of their numbers."""
        self._parts.append(part)
        if sum(len(part.trace) for part in self._parts) >= TOKENS_A_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what was taken since the last file."""
        if not self._parts:
            return
        first, last = self._parts[0].number, self._parts[-1].number
        partial = self._folder / "partial"
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **_packed(self._parts))
        partial.replace(self._folder / f"{first:08d}-{last:08d}.npz")
        self._parts = []
        self._write_meta(last)

    def _write_meta(self, last: int) -> None:
        partial = self._folder / "meta.partial"
        partial.write_text(json.dumps({**self._meta, "last": last}, indent=2))
        partial.replace(self._folder / META)


class TraceFiles:
    """Reads a trace, one file at a time.

    Iterating gives a `Trace` for each file, in order, as often as wanted. Where a file is missing
    or broken, what comes before it is given, one line says so in the log, and `cut` holds the line.

    Attributes:
      folder: where the trace is.
      meta: see `TraceMeta`.
      every: the distance between the numbers of parts.
      last: the number of the last part.
      info: all of meta.json.
      cut: what is wrong with the trace, as found when it was read; '' = nothing.
    """

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError, in one line, where no trace is there."""
        self.folder, self.cut = Path(folder), ""
        self._files = files_in(self.folder)
        self._loaded: dict[int, Part] = {}
        try:
            self.info: dict[str, Any] = json.loads((self.folder / META).read_text())
            kept: Any = {
                name: tuple(v) if isinstance(v, list) else v
                for name, v in self.info["trace"].items()
            }
            self.meta = TraceMeta(**kept)
            self.every: int = self.info["every"]
        except (OSError, ValueError, KeyError, TypeError):
            raise FileNotFoundError(
                f"{self.folder} holds no trace: there is no whole {META}"
            ) from None
        self.last = max([self.info["last"], *(last for _, last in self._files)])

    def __iter__(self) -> Iterator[Trace]:
        documents = 0
        for parts in self._whole_files():
            trace = concatenate([part.trace for part in parts])
            trace = dataclasses.replace(trace, document_T=trace.document_T + np.int32(documents))
            documents = int(trace.document_T[-1]) + 1 if len(trace) else documents
            yield trace

    def read(self, limit_tokens: int = 0) -> Trace:
        """All of it, or its first tokens, as one trace.

        Raises:
          ValueError: nothing of it can be read.
        """
        kept: list[Trace] = []
        tokens = 0
        for trace in self:
            kept.append(trace)
            tokens += len(trace)
            if limit_tokens and tokens >= limit_tokens:
                break
        if not kept:
            raise ValueError(self.cut or f"trace {self.folder} has no tokens: nothing was routed")
        return concatenate(kept)[: limit_tokens or None]

    def part(self, number: int) -> Part:
        """One part. Its file stays in memory for the next call.

        Raises:
          KeyError: it was not written.
          ValueError: its file is broken.
        """
        if number not in self._loaded:
            paths = [p for (first, last), p in self._files.items() if first <= number <= last]
            parts = self._parts(paths[0]) if paths else []
            self._loaded = {part.number: part for part in parts}
        return self._loaded[number]

    def _whole_files(self) -> Iterator[list[Part]]:
        """The parts of each file, up to the first that is missing or broken."""
        tokens, done = 0, 0
        problem = ""
        for (first, last), path in self._files.items():
            if done and first != done + self.every:
                problem = f"the file from number {done + self.every} on is missing"
                break
            try:
                parts = self._parts(path)
            except ValueError as error:
                problem = str(error)
                break
            tokens, done = tokens + sum(len(part.trace) for part in parts), last
            yield parts
        if not problem and done < self.last:
            problem = f"the file that ends at number {self.last} is missing"
        if problem:
            self.cut = (
                f"trace {self.folder} is cut short: {problem}; {tokens:,} tokens up to number "
                f"{done} of {self.last} could be read"
            )
            log.warning(self.cut)

    def _parts(self, path: Path) -> list[Part]:
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                return _unpacked(self.meta, dict(arrays))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise ValueError(f"{path.name} is broken") from None


def open_trace(folder: Path | str) -> TraceFiles:
    """The trace in a folder. Raises FileNotFoundError, in one line, where there is none."""
    return TraceFiles(Path(folder))


def files_in(folder: Path) -> dict[tuple[int, int], Path]:
    """(first, last) -> file, in order; {} where there is no such folder."""
    names = ((re.fullmatch(r"(\d+)-(\d+)", p.stem), p) for p in sorted(folder.glob("*.npz")))
    return {(int(name[1]), int(name[2])): path for name, path in names if name}


def _packed(parts: list[Part]) -> dict[str, np.ndarray]:
    documents, shifted = 0, []
    for part in parts:
        trace = part.trace
        if len(trace):
            document_T = trace.document_T - trace.document_T[0] + documents
            documents = int(document_T[-1]) + 1
            trace = dataclasses.replace(trace, document_T=document_T)
        shifted.append(trace)
    columns = dict(concatenate(shifted).columns())
    packed = {name: _smallest(a) for name, a in columns.items()}
    packed["dropped_TLR"] = np.packbits(columns["dropped_TLR"])
    return packed | {
        "number_N": np.array([part.number for part in parts], np.int64),
        "rows_N": np.array([len(part.tokens_B) for part in parts], np.int32),
        "tokens_R": np.concatenate([part.tokens_B for part in parts]).astype(np.int32),
        "position_N": np.array([part.position for part in parts], np.int64),
    }


def _smallest(a: np.ndarray) -> np.ndarray:
    """Integers in the smallest dtype that holds them; the rest as it is."""
    if a.dtype.kind not in "iu" or not a.size:
        return a
    least, most = int(a.min()), int(a.max())
    return a.astype(np.result_type(np.min_scalar_type(least), np.min_scalar_type(most)))


def _unpacked(meta: TraceMeta, arrays: dict[str, np.ndarray]) -> list[Part]:
    names = ("number_N", "rows_N", "tokens_R", "position_N")
    number_N, rows_N, tokens_R, position_N = (arrays.pop(name) for name in names)
    shape = arrays["expert_TLR"].shape
    bits = np.unpackbits(arrays["dropped_TLR"], count=int(np.prod(shape)))
    arrays["dropped_TLR"] = bits.astype(bool).reshape(shape)
    columns: Any = {
        name: a.astype(np.int32) if name.endswith("_T") else a for name, a in arrays.items()
    }
    columns["expert_TLR"] = columns["expert_TLR"].astype(index_dtype(meta.experts))
    whole, parts, begin = Trace(meta, **columns), [], 0
    for i, tokens_B in enumerate(np.split(tokens_R, np.cumsum(rows_N)[:-1])):
        end = begin + int(tokens_B.sum())
        parts.append(Part(int(number_N[i]), whole[begin:end], tokens_B, int(position_N[i])))
        begin = end
    return parts
