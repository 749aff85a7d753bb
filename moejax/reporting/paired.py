"""Arms paired by seed: the mean difference and its one-sided 95 % half width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Student's t, one-sided 95 %, for n = 2..30 samples (n - 1 degrees of freedom).
T95 = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812),
    *(1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725),
    *(1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699),
)
# The F distribution's upper 5 %, for two samples of n = 2..10 each (n - 1 degrees of freedom).
F95 = (161.4, 19.00, 9.277, 6.388, 5.050, 4.284, 3.787, 3.438, 3.179)


class Estimate(NamedTuple):
    """mean +- half_width over n seeds; half_width is infinite for a single seed."""

    mean: float
    half_width: float
    n: int


def t95(n: int) -> float:
    """The t that n samples need for a one-sided 95 % bound; the normal's 1.645 beyond n = 30."""
    if n < 2:
        return math.inf
    return T95[n - 2] if n <= 30 else 1.645


def f95(n: int) -> float:
    """The ratio of two variances of n samples each that chance exceeds in 5 % of cases; for more
    than 10 samples that of 10, which asks for more."""
    if n < 2:
        return math.inf
    return F95[min(n, 10) - 2]


def standard_deviation(values: Sequence[float]) -> float | None:
    """Unbiased (n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half width t s / sqrt(n)."""
    n = len(values)
    spread = standard_deviation(values)
    half_width = math.inf if spread is None else t95(n) * spread / math.sqrt(n)
    return Estimate(math.fsum(values) / n, half_width, n)
