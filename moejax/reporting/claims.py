"""Claims of a paper, and the form of their verdicts: held, not held or inconclusive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .results import Results

Status = Literal["held", "not held", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    """effect +- half_width over n paired seeds, against margin, in the units of the metric.

    For a ratio the three numbers are natural logarithms. NaN where nothing could be measured.
    """

    status: Status
    effect: float
    half_width: float
    n: int
    margin: float
    text: str


Judge = Callable[[Results], Verdict]


@dataclass(frozen=True)
class Claim:
    """A statement with its source. Strength S: should hold at small scale; D: a direction, often
    inconclusive under 1e9 tokens; R: reported, not judged."""

    id: str
    statement: str
    source: str
    strength: Literal["S", "D", "R"]
    judge: Judge

    def __post_init__(self) -> None:
        if self.strength not in ("S", "D", "R"):
            raise ValueError(f"claim {self.id}: strength {self.strength!r} is none of S, D, R")


def all_of(*judges: Judge) -> Judge:
    """Held if every part is held, not held if one is not; the numbers are of the part that
    decided.
    """

    def judge(results: Results) -> Verdict:
        verdicts = [part(results) for part in judges]
        rank = {"not held": 0, "inconclusive": 1, "held": 2}
        weakest = min(verdicts, key=lambda v: rank[v.status])
        text = "; ".join(f"[{v.status}] {v.text}" for v in verdicts)
        return Verdict(
            weakest.status, weakest.effect, weakest.half_width, weakest.n, weakest.margin, text
        )

    return judge
