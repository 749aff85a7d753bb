"""How early a run's routing settles: at each evaluation the same validation tokens' routing is kept
as a trace, WORKDIR/evaluations/STEP, and at the end held to the last one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moejax.analysis.counting import Measured
from moejax.analysis.saturation import Saturation
from moejax.tracing import Part, Trace, TraceWriter, open_trace

FOLDER = "evaluations"


def keep(workdir: Path, step: int, trace: Trace) -> None:
    """Write the trace of an evaluation's first tokens; one of the same step is replaced."""
    writer = TraceWriter(workdir / FOLDER / f"{step:08d}", trace.meta)
    writer.add(Part(1, trace, np.array([len(trace)])))
    writer.flush()


def saturation(workdir: Path) -> dict[str, Any]:
    """Of what each layer chooses at the end, the share that it chose at each evaluation before.

    Returns:
      step: of each evaluation but the last; saturation_SL: the shares; floor: that of a routing by
      chance, K / E, mean of the layers; tokens. {} where fewer than two evaluations of the same
      tokens were kept: another attempt at the run may have had another train.eval_rows.
    """
    kept = list(_kept(workdir))
    if not kept:
        return {}
    *kept, (_, last) = kept
    before = [(s, each) for s, each in kept if np.array_equal(each.token_T, last.token_T)]
    if not before:
        return {}
    measured = [_measured(each, last) for _, each in before]
    return {
        "step": [step for step, _ in before],
        "saturation_SL": [found.value.tolist() for found in measured],
        "floor": float(np.mean(measured[-1].random)),
        "tokens": len(last),
    }


def _measured(earlier: Trace, last: Trace) -> Measured:
    sums = Saturation(last.meta)
    sums.add(earlier, last)
    return sums.saturation()


def _kept(workdir: Path) -> Iterator[tuple[int, Trace]]:
    """(step, trace) of each evaluation; one that a kill left unfinished is passed over."""
    for folder in sorted((workdir / FOLDER).glob("[0-9]*")):
        with contextlib.suppress(FileNotFoundError, ValueError):
            yield int(folder.name), open_trace(folder).read()
