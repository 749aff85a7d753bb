"""What uniform random routing gives by chance: no measurement of balance can claim less than
this.
"""

from __future__ import annotations

import functools
import math


def max_vio_floor(tokens: float, experts: int, k: float) -> float:
    """MaxVio = max load / mean load - 1 expected when every token picks k of the experts at random.

    c_E sqrt(E (E - K) / ((E - 1) T K)), c_E = the expected maximum of E standard normals; within
    5 % of simulation where an expert gets some tens of tokens. 0 where every token visits all.
    Where tokens of k_t experts differ, k is sum k_t^2 / sum k_t, and `tokens` sum k_t / k.
    """
    _check(tokens, experts, k)
    if experts == 1 or k >= experts:
        return 0.0
    spread = math.sqrt(experts * (experts - k) / ((experts - 1) * tokens * k))
    return expected_normal_maximum(experts) * spread


def drop_floor(tokens: int, experts: int, k: int, capacity_factor: float) -> float:
    """Share of assignments (0..1) dropped under random routing in groups of this many tokens.

    Capacity C = ceil(cf K S / E) per expert; the expected excess of a normal load over C.
    """
    _check(tokens, experts, k)
    if capacity_factor <= 0:
        raise ValueError(f"capacity factor {capacity_factor} is not positive")
    mean = tokens * k / experts
    sd = math.sqrt(mean * (1 - k / experts))
    excess = math.ceil(capacity_factor * mean - 1e-9) - mean
    if sd == 0:
        return max(0.0, -excess / mean)
    z = excess / sd
    return (sd / mean) * (_density(z) - z * _upper_tail(z))


def cv_floor(tokens: float, experts: int, k: float) -> float:
    """Population standard deviation of the load over its mean, sqrt((E - K) / (T K))."""
    _check(tokens, experts, k)
    return math.sqrt((experts - k) / (tokens * k))


def load_entropy_floor(tokens: float, experts: int, k: float) -> float:
    """Entropy of the load over ln E, to second order: 1 - (E - K) / (2 T K ln E)."""
    _check(tokens, experts, k)
    return 1 - (experts - k) / (2 * tokens * k * math.log(max(2, experts)))


def overlap_floor(experts: int, a: int, b: int) -> float:
    """Probability that a and b of the experts, drawn at random, have one in common: 1 - C(E - a, b)
    / C(E, b)."""
    return 1 - math.comb(experts - a, b) / math.comb(experts, b)


@functools.cache
def expected_normal_maximum(n: int) -> float:
    """E[max of n independent standard normals] = integral of x n phi(x) Phi(x)^(n-1)."""
    step = 1 / 256
    grid = (i * step for i in range(-8 * 256, 8 * 256 + 1))
    return step * sum(x * n * _density(x) * (1 - _upper_tail(x)) ** (n - 1) for x in grid)


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _upper_tail(x: float) -> float:
    return 0.5 * math.erfc(x / math.sqrt(2))


def _check(tokens: float, experts: int, k: float) -> None:
    if tokens < 1 or experts < 1 or not 1 <= k <= experts:
        raise ValueError(f"need tokens >= 1 and 1 <= k <= experts, got {tokens=} {experts=} {k=}")
