"""Claims of a paper, judged on results: held, not held or inconclusive.

Arms are paired by seed (same data order, same evaluation set). d is the mean difference, h its
one-sided 95 % half width; a claim is held when d + h clears its bound, not held when d - h misses
it. The margin of "no worse" and "the same" is fixed before the run: 0.5 % of the second arm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .metrics import StepsTo
from .paired import Estimate, estimate
from .results import Metric, Results, Run

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


class Pairs(NamedTuple):
    """Values of two arms by seed, or why there are none."""

    a: list[float]
    b: list[float]
    reason: str
    a_diverged: bool = False


def less(metric: Metric, a: str, b: str) -> Judge:
    """a < b."""

    def judge(results: Results) -> Verdict:
        pairs = _pair(results, metric, a, b)
        if pairs.reason:
            return _unmeasured(pairs)
        d = estimate([x - y for x, y in zip(pairs.a, pairs.b, strict=True)])
        return _below(d, 0.0, f"{metric}: {a} - {b}", _note(results, a, b))

    return judge


def at_most(metric: Metric, a: str, b: str, margin: float = 0.005) -> Judge:
    """a <= b + margin, the margin a share of b's mean."""

    def judge(results: Results) -> Verdict:
        pairs = _pair(results, metric, a, b)
        if pairs.reason:
            return _unmeasured(pairs)
        d = estimate([x - y for x, y in zip(pairs.a, pairs.b, strict=True)])
        return _below(d, margin * _mean_size(pairs.b), f"{metric}: {a} - {b}", _note(results, a, b))

    return judge


def similar(metric: Metric, a: str, b: str, margin: float = 0.005) -> Judge:
    """|a - b| < margin, the margin a share of b's mean."""

    def judge(results: Results) -> Verdict:
        pairs = _pair(results, metric, a, b)
        if pairs.reason:
            return _unmeasured(pairs._replace(a_diverged=False))
        d = estimate([x - y for x, y in zip(pairs.a, pairs.b, strict=True)])
        verdict = _below(d._replace(mean=abs(d.mean)), margin * _mean_size(pairs.b), "", "")
        text = f"{metric}: |{a} - {b}|{verdict.text}{_note(results, a, b)}"
        return Verdict(verdict.status, d.mean, d.half_width, d.n, verdict.margin, text)

    return judge


def ratio_at_least(
    metric: Metric, a: str, b: str, factor: float, floor: float | Metric | None = None
) -> Judge:
    """a / b >= factor, judged on logarithms; both values are first raised to the floor.

    The floor is a number or a metric of the same run ("eval.max_vio_floor"). Where b sits at its
    floor the ratio is only a lower bound, so that falling short of the factor is inconclusive.
    """

    def judge(results: Results) -> Verdict:
        pairs = _pair(results, metric, a, b)
        floors = _pair(results, _floor_metric(floor), a, b)
        if pairs.reason or floors.reason:
            return _unmeasured((pairs if pairs.reason else floors)._replace(a_diverged=False))
        tops = [max(x, f) for x, f in zip(pairs.a, floors.a, strict=True)]
        bottoms = [max(x, f) for x, f in zip(pairs.b, floors.b, strict=True)]
        if min(*tops, *bottoms) <= 0:
            return _nothing(
                f"{metric}: a ratio with {min(*tops, *bottoms):g}; give a floor above 0"
            )
        d = estimate([math.log(x / y) for x, y in zip(tops, bottoms, strict=True)])
        at_floor = any(x <= f for x, f in zip(pairs.b, floors.b, strict=True))
        return _ratio(d, factor, at_floor, f"{metric}: {a} / {b}", _note(results, a, b))

    return judge


def positive(metric: Metric, a: str) -> Judge:
    """a > 0, over its seeds."""

    def judge(results: Results) -> Verdict:
        pairs = _pair(results, metric, a, a)
        if pairs.reason:
            return _unmeasured(pairs._replace(a_diverged=False))
        d = estimate(pairs.a)
        status = _status(-d.mean, d.half_width, 0.0)
        return Verdict(status, *d, 0.0, f"{metric}: {a} {_plus_minus(d)}, must be > 0")

    return judge


def sooner(a: str, b: str, target: str) -> Judge:
    """a needs fewer steps than b to reach the target arm's final eval BPB at the same seed.

    An a that never gets there while b does is not held; a b that never does is inconclusive.
    """

    def judge(results: Results) -> Verdict:
        goals = {seed: run.value("eval.bpb") for seed, run in results.of(target).items()}

        def steps(run: Run) -> float | None:
            goal = goals.get(run.seed)
            return None if goal is None else StepsTo(goal)(run)

        verdict = less(steps, a, b)(results)
        text = verdict.text.replace(f"{steps}", f"steps to the final bpb of {target}")
        return replace(verdict, text=text)

    return judge


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


def _below(d: Estimate, margin: float, what: str, note: str) -> Verdict:
    status = _status(d.mean, d.half_width, margin)
    bound = f"must be < {margin:.3g}" if margin else "must be < 0"
    return Verdict(status, *d, margin, f"{what} {_plus_minus(d)}, {bound}{note}")


def _ratio(d: Estimate, factor: float, at_floor: bool, what: str, note: str) -> Verdict:
    status = _status(-d.mean, d.half_width, -math.log(factor))
    low, high = math.exp(d.mean - d.half_width), math.exp(d.mean + d.half_width)
    text = f"{what} = {math.exp(d.mean):.3g} ({low:.3g} to {high:.3g}), must be >= {factor:g}"
    if at_floor:
        status = "inconclusive" if status == "not held" else status
        text += "; the lower arm is at its floor, the ratio is a lower bound"
    return Verdict(status, *d, math.log(factor), text + note)


def _status(d: float, h: float, bound: float) -> Status:
    """Is d below the bound?"""
    if d + h < bound:
        return "held"
    return "not held" if d - h > bound else "inconclusive"


def _pair(results: Results, metric: Metric, a: str, b: str) -> Pairs:
    """The metric of both arms at the seeds that both finished."""
    runs_a, runs_b = results.of(a), results.of(b)
    seeds = sorted(runs_a.keys() & runs_b.keys())
    if len(seeds) < 2:
        arms = a if a == b else f"{a} and {b}"
        return Pairs([], [], f"{len(seeds)} finished seeds of {arms}, at least 2 are needed")
    for seed in seeds:
        if runs_a[seed].fingerprint != runs_b[seed].fingerprint:
            return Pairs([], [], f"{a} and {b} saw different data at seed {seed}: not comparable")
    return _values(metric, [runs_a[seed] for seed in seeds], [runs_b[seed] for seed in seeds])


def _values(metric: Metric, runs_a: Sequence[Run], runs_b: Sequence[Run]) -> Pairs:
    values: dict[str, float] = {}
    for run in (*runs_a, *runs_b):
        value = run.value(metric)
        if value is None:
            return Pairs([], [], f"{run.name} has no {metric}")
        values[run.name] = value
    a, b = [values[run.name] for run in runs_a], [values[run.name] for run in runs_b]
    if bad := [f"{name} has {metric} = {v}" for name, v in values.items() if not math.isfinite(v)]:
        a_diverged = all(map(math.isfinite, b))
        return Pairs(a, b, "; ".join(bad), a_diverged)
    return Pairs(a, b, "")


def _unmeasured(pairs: Pairs) -> Verdict:
    """An arm that should be lower and diverged is worse, not unknown; all else is inconclusive."""
    if pairs.a_diverged:
        return Verdict("not held", math.nan, math.nan, len(pairs.a), math.nan, pairs.reason)
    return _nothing(pairs.reason)


def _nothing(reason: str) -> Verdict:
    return Verdict("inconclusive", math.nan, math.nan, 0, math.nan, reason)


def _floor_metric(floor: float | Metric | None) -> Metric:
    if floor is None or isinstance(floor, int | float):
        number = float(floor or 0.0)
        return lambda run: number
    return floor


def _mean_size(values: Sequence[float]) -> float:
    return abs(math.fsum(values) / len(values))


def _plus_minus(d: Estimate) -> str:
    return f"= {d.mean:+.4g} ± {d.half_width:.2g}"


def _note(results: Results, *arms: str) -> str:
    """Name the arms whose router sees later tokens: their training loss is no language model's."""
    leaking = [a for a in arms if any(run.info.get("leaks") for run in results.of(a).values())]
    return f" ({', '.join(leaking)}: not causal in training)" if leaking else ""
