"""Judges of several arms, of an arm against a number, and of the spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .claims import Judge, Verdict, all_of
from .judging import below, judged, listed, mean_size, note, nothing, pair, plus_minus, unmeasured
from .paired import estimate, f95, standard_deviation
from .results import Metric, Results


def contrast(metric: Metric, weights: Mapping[str, float]) -> Judge:
    """A weighted sum of arms is above 0, seed by seed: {"a1": 1, "a2": -1, "b1": -1, "b2": 1} says
    that a1 - a2 is more than b1 - b2."""

    def judge(results: Results) -> Verdict:
        arms = list(weights)
        found = pair(results, metric, *arms)
        if found.reason:
            return unmeasured(found)
        by_seed = zip(*found.values, strict=True)
        sums = [
            sum(w * x for w, x in zip(weights.values(), values, strict=True)) for values in by_seed
        ]
        d = estimate(sums)
        what = " ".join(f"{_sign(weight)}{arm}" for arm, weight in weights.items())
        text = f"{metric}: {what.removeprefix('+ ')} {plus_minus(d)}, must be > 0"
        return Verdict(judged(-d.mean, d.half_width, 0.0), *d, 0.0, text + note(results, *arms))

    return judge


def falling(metric: Metric, *arms: str, margin: float = 0.005) -> Judge:
    """The last arm is below the first, and none is above the one before it by more than the margin,
    a share of the first arm's mean."""

    def step(before: str, after: str, bound: float | None) -> Judge:
        def judge(results: Results) -> Verdict:
            found = pair(results, metric, after, before, arms[0])
            if found.reason:
                return unmeasured(found._replace(diverged=found.diverged[:2]), bound is not None)
            d = estimate([x - y for x, y, _ in zip(*found.values, strict=True)])
            limit = 0.0 if bound is None else bound * mean_size(found.values[2])
            return below(d, limit, f"{metric}: {after} - {before}", note(results, after, before))

        return judge

    links = zip(arms, arms[1:], strict=False)
    return all_of(step(arms[0], arms[-1], None), *(step(a, b, margin) for a, b in links))


def under(metric: Metric, a: str, bound: float) -> Judge:
    """a < a number, over its seeds."""

    def judge(results: Results) -> Verdict:
        found = pair(results, metric, a)
        if found.reason:
            return unmeasured(found, lower_is_better=True)
        d = estimate(found.values[0])
        status = judged(d.mean, d.half_width, bound)
        text = f"{metric}: {a} {plus_minus(d)}, must be < {bound:g}{note(results, a)}"
        return Verdict(status, *d, bound, text)

    return judge


def steadier(metric: Metric, a: str, b: str) -> Judge:
    """The standard deviation of a over its seeds is below that of b: F test of the variances, one
    side, 95 %. The numbers are logarithms of sd_b / sd_a. With 3 seeds only a factor of 4.4 will
    do, with 5 one of 2.5.

    A b that diverged at some seed while a did not is not steady: held.
    """

    def judge(results: Results) -> Verdict:
        found = pair(results, metric, a, b)
        if found.reason and not (found.diverged and found.diverged == (False, True)):
            return unmeasured(found)
        n = len(found.values[0])
        if found.reason:
            return Verdict("held", math.inf, 0.0, n, 0.0, f"{found.reason}; {a} never")
        low, high = (standard_deviation(values) or 0.0 for values in found.values)
        if not low or not high:
            return nothing(f"{metric}: the seeds of {a if not low else b} do not differ")
        effect, half_width = math.log(high / low), 0.5 * math.log(f95(n))
        factor = math.exp(half_width)
        text = (
            f"sd of {metric} over seeds: {b} {high:.3g} / {a} {low:.3g} = {high / low:.3g}, "
            f"must be > {factor:.3g}"
        )
        return Verdict(judged(-effect, half_width, 0.0), effect, half_width, n, 0.0, text)

    return judge


def sees_later(yes: tuple[str, ...] = (), no: tuple[str, ...] = ()) -> Judge:
    """Whether training lets tokens depend on later ones, as `moejax.causality` found by trying: so
    for every run of `yes`, not so for every one of `no`. No statistics: it is the same at each
    seed."""

    def judge(results: Results) -> Verdict:
        told = {arm: {bool(r.info.get("leaks")) for r in results.of(arm).values()} for arm in yes}
        told |= {arm: {bool(r.info.get("leaks")) for r in results.of(arm).values()} for arm in no}
        if absent := [arm for arm, found in told.items() if not found]:
            return nothing(f"no finished run of {listed(absent)}")
        wrong = [arm for arm in told if told[arm] != {arm in yes}]
        parts = [f"later tokens are seen by {listed(yes)}"] if yes else []
        parts += [f"not by {listed(no)}"] if no else []
        text = ", ".join(parts) + (f"; otherwise: {listed(wrong)}" if wrong else "")
        n = min(len(results.of(arm)) for arm in told)
        return Verdict("not held" if wrong else "held", float(len(wrong)), 0.0, n, 0.0, text)

    return judge


def _sign(weight: float) -> str:
    size = "" if abs(weight) == 1 else f"{abs(weight):g} "
    return f"{'-' if weight < 0 else '+'} {size}"
