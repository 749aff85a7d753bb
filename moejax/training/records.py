"""What a run writes while it trains: metrics.jsonl, TensorBoard events, and a live line for
people."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


class Records:
    """metrics.jsonl and TensorBoard. One JSON object a line; every line is complete when
    written."""

    def __init__(self, workdir: Path, resume_step: int) -> None:
        """Keeps the records up to `resume_step`; later ones will be made again."""
        from tensorboardX import SummaryWriter  # here: it pulls in protobuf

        self._path = workdir / "metrics.jsonl"
        kept = [r for r in read_records(self._path) if r["step"] <= resume_step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept))
        partial.replace(self._path)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record with `kind` and `step`; numbers, nested ones and those of layers go to
        TensorBoard too, and an evaluation's load as a heat map."""
        record = _plain(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in _scalars(record):
            self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        if record["kind"] == "eval" and record.get("load_LE"):
            image = load_image(np.asarray(record["load_LE"]))
            self._board.add_image("eval/load", image, record["step"], dataformats="HWC")

    def show_saturation(self, found: dict[str, Any]) -> None:
        """To TensorBoard, what `settling.saturation` found; {} = nothing."""
        for step, value_L in zip(*(found.get(k, []) for k in SATURATION), strict=True):
            for name, value in _scalars({"saturation_L": value_L}):
                self._board.add_scalar(f"eval/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


SATURATION = ("step", "saturation_SL")


def load_image(load_LE: np.ndarray) -> np.ndarray:
    """uint8 [pixels, pixels, 3]: a layer a row, an expert a column; white = its fair share, red =
    four times as much or more, blue = a quarter or less."""
    share_LE = np.clip(load_LE * load_LE.shape[1], 0.25, 4)
    heat_LE = np.log2(share_LE) / 2  # -1 .. 1
    red, blue = (1 - np.clip(sign * heat_LE, 0, 1) for sign in (-1, 1))
    rgb = np.stack([red, np.minimum(red, blue), blue], -1)
    return np.kron((255 * rgb).astype(np.uint8), np.ones((12, 12, 1), np.uint8))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class Progress:
    """The live line: step, loss, tokens/s, MFU, ETA, MaxVio, drops. On a pipe, a line now and
    then."""

    def __init__(self, label: str, steps: int, quiet: bool = False) -> None:
        self._label, self._steps, self._quiet = label, steps, quiet
        self._live = sys.stderr.isatty()
        self._next = 0.0

    def show(self, record: dict[str, Any], seconds_left: float) -> None:
        last = record["step"] == self._steps
        if self._quiet or (not self._live and not last and time.monotonic() < self._next):
            return
        self._next = time.monotonic() + 10.0
        parts = [
            f"{self._label} {record['step']}/{self._steps}",
            f"loss {record['loss']:.4f}",
            f"{record['tokens_per_s']:,.0f} tokens/s",
            f"MFU {record['mfu']:.1%}",
            f"ETA {seconds_left:.0f} s",
        ]
        if "max_vio" in record:
            parts += [f"MaxVio {record['max_vio']:.2f}", f"drops {record['drop']:.1%}"]
        self._print("  ".join(parts), end="" if self._live and not last else "\n")

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._print(text, end="\n")

    def _print(self, text: str, end: str) -> None:
        print(f"\r\x1b[K{text}" if self._live else text, end=end, file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return np.asarray(value, np.float64).round(8).tolist()
    return value


def _scalars(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, list) and key.endswith("_L"):
            found += [(f"{prefix}{key}/{layer}", item) for layer, item in enumerate(value)]
        elif isinstance(value, int | float) and key not in ("step", "kind"):
            found.append((prefix + key, value))
    return found
