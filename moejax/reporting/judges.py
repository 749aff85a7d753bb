"""Judges of one arm or two. The margin of "no worse" and "the same" is fixed before the run: 0.5 %
of the second arm.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .claims import Judge, Verdict
from .judging import below, judged, mean_size, note, nothing, pair, plus_minus, unmeasured
from .metrics import StepsTo
from .paired import Estimate, estimate
from .results import Metric, Results, Run


def less(metric: Metric, a: str, b: str) -> Judge:
    """a < b."""

    def judge(results: Results) -> Verdict:
        pairs = pair(results, metric, a, b)
        if pairs.reason:
            return unmeasured(pairs, lower_is_better=True)
        d = estimate([x - y for x, y in zip(*pairs.values, strict=True)])
        return below(d, 0.0, f"{metric}: {a} - {b}", note(results, a, b))

    return judge


def at_most(metric: Metric, a: str, b: str, margin: float = 0.005) -> Judge:
    """a <= b + margin, the margin a share of b's mean."""

    def judge(results: Results) -> Verdict:
        pairs = pair(results, metric, a, b)
        if pairs.reason:
            return unmeasured(pairs, lower_is_better=True)
        d = estimate([x - y for x, y in zip(*pairs.values, strict=True)])
        return below(
            d, margin * mean_size(pairs.values[1]), f"{metric}: {a} - {b}", note(results, a, b)
        )

    return judge


def similar(metric: Metric, a: str, b: str, margin: float = 0.005) -> Judge:
    """|a - b| < margin, the margin a share of b's mean."""

    def judge(results: Results) -> Verdict:
        pairs = pair(results, metric, a, b)
        if pairs.reason:
            return unmeasured(pairs)
        d = estimate([x - y for x, y in zip(*pairs.values, strict=True)])
        verdict = below(d._replace(mean=abs(d.mean)), margin * mean_size(pairs.values[1]), "", "")
        text = f"{metric}: |{a} - {b}|{verdict.text}{note(results, a, b)}"
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
        pairs = pair(results, metric, a, b)
        floors = pair(results, _floor_metric(floor), a, b)
        if pairs.reason or floors.reason:
            return unmeasured(pairs if pairs.reason else floors)
        tops = [max(x, f) for x, f in zip(pairs.values[0], floors.values[0], strict=True)]
        bottoms = [max(x, f) for x, f in zip(pairs.values[1], floors.values[1], strict=True)]
        if min(*tops, *bottoms) <= 0:
            return nothing(f"{metric}: a ratio with {min(*tops, *bottoms):g}; give a floor above 0")
        d = estimate([math.log(x / y) for x, y in zip(tops, bottoms, strict=True)])
        at_floor = any(x <= f for x, f in zip(pairs.values[1], floors.values[1], strict=True))
        return _ratio(d, factor, at_floor, f"{metric}: {a} / {b}", note(results, a, b))

    return judge


def positive(metric: Metric, a: str) -> Judge:
    """a > 0, over its seeds."""
    return over(metric, a, 0.0)


def over(metric: Metric, a: str, bound: float) -> Judge:
    """a > a number, over its seeds."""

    def judge(results: Results) -> Verdict:
        pairs = pair(results, metric, a, a)
        if pairs.reason:
            return unmeasured(pairs)
        d = estimate(pairs.values[0])
        status = judged(-d.mean, d.half_width, -bound)
        return Verdict(status, *d, bound, f"{metric}: {a} {plus_minus(d)}, must be > {bound:g}")

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


def _ratio(d: Estimate, factor: float, at_floor: bool, what: str, note: str) -> Verdict:
    status = judged(-d.mean, d.half_width, -math.log(factor))
    low, high = math.exp(d.mean - d.half_width), math.exp(d.mean + d.half_width)
    text = f"{what} = {math.exp(d.mean):.3g} ({low:.3g} to {high:.3g}), must be >= {factor:g}"
    if at_floor:
        status = "inconclusive" if status == "not held" else status
        text += "; the lower arm is at its floor, the ratio is a lower bound"
    return Verdict(status, *d, math.log(factor), text + note)


def _floor_metric(floor: float | Metric | None) -> Metric:
    if floor is None or isinstance(floor, int | float):
        number = float(floor or 0.0)
        return lambda run: number
    return floor
