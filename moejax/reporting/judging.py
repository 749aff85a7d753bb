"""The arithmetic of verdicts. Arms are paired by seed (same data order, same evaluation set). d is
the mean difference, h its one-sided 95 % half width; a claim is held when d + h clears its bound,
not held when d - h misses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .claims import Status, Verdict
from .paired import Estimate
from .results import Metric, Results, Run


class Paired(NamedTuple):
    """Values by arm, then by seed, or why there are none; and which arms diverged."""

    values: list[list[float]]
    reason: str
    diverged: tuple[bool, ...] = ()

    @property
    def first_diverged(self) -> bool:
        """The first arm alone: where it should be lower, that is worse, not unknown."""
        return any(self.diverged) and self.diverged[0] and not any(self.diverged[1:])


def pair(results: Results, metric: Metric, *arms: str) -> Paired:
    """The metric of all arms at the seeds that all of them finished."""
    runs = [results.of(arm) for arm in arms]
    seeds = sorted(set.intersection(*(set(found) for found in runs)))
    names = list(dict.fromkeys(arms))
    if len(seeds) < 2:
        return Paired([], f"{len(seeds)} finished seeds of {listed(names)}, at least 2 are needed")
    for seed in seeds:
        if len({found[seed].fingerprint for found in runs}) > 1:
            what = f"{listed(names)} saw different data at seed {seed}: not comparable"
            return Paired([], what)
    return values(metric, [[found[seed] for seed in seeds] for found in runs])


def values(metric: Metric, runs: Sequence[Sequence[Run]]) -> Paired:
    """The metric of runs by arm, or which of them has none or an infinite one."""
    found: list[list[float]] = []
    bad: dict[str, float] = {}
    for arm in runs:
        found.append([])
        for run in arm:
            value = run.value(metric)
            if value is None:
                return Paired([], f"{run.name} has no {metric}")
            if not math.isfinite(value):
                bad[run.name] = value
            found[-1].append(value)
    reason = "; ".join(f"{name} has {metric} = {value}" for name, value in bad.items())
    return Paired(found, reason, tuple(not all(map(math.isfinite, arm)) for arm in found))


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def below(d: Estimate, margin: float, what: str, note: str) -> Verdict:
    status = judged(d.mean, d.half_width, margin)
    bound = f"must be < {margin:.3g}" if margin else "must be < 0"
    return Verdict(status, *d, margin, f"{what} {plus_minus(d)}, {bound}{note}")


def judged(d: float, h: float, bound: float) -> Status:
    """Is d below the bound?"""
    if d + h < bound:
        return "held"
    return "not held" if d - h > bound else "inconclusive"


def unmeasured(pairs: Paired, lower_is_better: bool = False) -> Verdict:
    """An arm that should be lower and diverged is worse, not unknown; all else is inconclusive."""
    if lower_is_better and pairs.first_diverged:
        n = len(pairs.values[0])
        return Verdict("not held", math.nan, math.nan, n, math.nan, pairs.reason)
    return nothing(pairs.reason)


def nothing(reason: str) -> Verdict:
    return Verdict("inconclusive", math.nan, math.nan, 0, math.nan, reason)


def mean_size(values: Sequence[float]) -> float:
    return abs(math.fsum(values) / len(values))


def plus_minus(d: Estimate) -> str:
    return f"= {d.mean:+.4g} ± {d.half_width:.2g}"


def note(results: Results, *arms: str) -> str:
    """Name the arms whose router sees later tokens: their training loss is no language model's."""
    leaking = [a for a in arms if any(run.info.get("leaks") for run in results.of(a).values())]
    return f" ({', '.join(leaking)}: not causal in training)" if leaking else ""
