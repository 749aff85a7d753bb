"""Metrics that are computed from a run's records, for judges: a name to print and a function of
the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .results import Metric, Run


@dataclass(frozen=True)
class Difference:
    """high - low of two metrics of the same run, e.g. drops of the second choice minus the
    first.
    """

    high: Metric
    low: Metric

    def __call__(self, run: Run) -> float | None:
        high, low = run.value(self.high), run.value(self.low)
        return None if high is None or low is None else high - low

    def __str__(self) -> str:
        return f"{self.high} - {self.low}"


@dataclass(frozen=True)
class Quotient:
    """top / bottom of two metrics of the same run; None where the bottom is 0."""

    top: Metric
    bottom: Metric

    def __call__(self, run: Run) -> float | None:
        top, bottom = run.value(self.top), run.value(self.bottom)
        return None if top is None or not bottom else top / bottom

    def __str__(self) -> str:
        return f"{self.top} / {self.bottom}"


@dataclass(frozen=True)
class Either:
    """The first of two metrics that the run has."""

    first: Metric
    second: Metric

    def __call__(self, run: Run) -> float | None:
        found = run.value(self.first)
        return run.value(self.second) if found is None else found

    def __str__(self) -> str:
        return f"{self.first} or {self.second}"


@dataclass(frozen=True)
class Window:
    """Mean of one field of the training records between two shares of the run (0 = start, 1 =
    end).
    """

    field: str
    start: float
    stop: float

    def __call__(self, run: Run) -> float | None:
        return run.mean(self.field, self.start, self.stop)

    def __str__(self) -> str:
        return f"{self.field} in {self.start:.0%}..{self.stop:.0%} of training"


@dataclass(frozen=True)
class StepsTo:
    """Steps until the eval BPB reaches `bpb`, between two evaluations linearly; NaN if it never
    does.
    """

    bpb: float

    def __call__(self, run: Run) -> float | None:
        before: tuple[float, float] | None = None
        for record in run.evals:
            step, bpb = float(record["step"]), float(record["bpb"])
            if bpb <= self.bpb:
                if before is None:
                    return step
                share = (before[1] - self.bpb) / (before[1] - bpb)
                return before[0] + share * (step - before[0])
            before = step, bpb
        return math.nan if run.evals else None

    def __str__(self) -> str:
        return f"steps to {self.bpb:.4f} bpb"
