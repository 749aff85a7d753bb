"""How early a run's routing settles: at each evaluation the same validation tokens' routing is kept
as a trace, WORKDIR/evaluations/STEP, and at the end held to the last one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

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
      chance, K / E; tokens. {} where fewer than two evaluations of the same tokens were kept:
      another attempt at the run may have had another train.eval_rows.
    """
    kept = list(_kept(workdir))
    if not kept:
        return {}
    *kept, (_, last) = kept
    before = [(s, each) for s, each in kept if np.array_equal(each.token_T, last.token_T)]
    if not before:
        return {}
    assigned = last.expert_TLR < last.meta.experts
    return {
        "step": [step for step, _ in before],
        "saturation_SL": [common_L(each, last).tolist() for _, each in before],
        "floor": float(assigned.sum(-1).mean() / last.meta.experts),
        "tokens": len(last),
    }


def _kept(workdir: Path) -> Iterator[tuple[int, Trace]]:
    """(step, trace) of each evaluation; one that a kill left unfinished is passed over."""
    for folder in sorted((workdir / FOLDER).glob("[0-9]*")):
        with contextlib.suppress(FileNotFoundError, ValueError):
            yield int(folder.name), open_trace(folder).read()


def common_L(earlier: Trace, last: Trace) -> np.ndarray:
    """For each layer, the share of the last trace's assignments that the earlier one has too
    (Muennighoff et al. 2024, 2409.02060, section 5.1).

    Raises:
      ValueError: they are of other tokens.
    """
    if not np.array_equal(earlier.token_T, last.token_T):
        raise ValueError(
            f"saturation compares the same tokens: these are {len(earlier)} and {len(last)}, not "
            "the same ones"
        )
    before_TLE, after_TLE = (_chosen(trace) for trace in (earlier, last))
    common = (before_TLE & after_TLE).sum((0, 2))
    return common / np.maximum(after_TLE.sum((0, 2)), 1)


def _chosen(trace: Trace) -> np.ndarray:
    """bool [T, L, E]."""
    experts = trace.meta.experts
    chosen = np.zeros((*trace.expert_TLR.shape[:2], experts + 1), bool)  # and nowhere
    np.put_along_axis(chosen, trace.expert_TLR.astype(np.int64), True, -1)
    return chosen[..., :experts]
