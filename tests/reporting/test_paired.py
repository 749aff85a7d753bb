"""The t table against the integral of Student's density, and the arithmetic of an interval."""

import math

import numpy as np
import pytest

from moejax.reporting.paired import T95, estimate, standard_deviation, t95


@pytest.mark.parametrize("n", range(2, 31))
def test_t_leaves_five_percent_above(n: int) -> None:
    freedom = n - 1
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    x = np.linspace(0, t95(n), 4001)
    below = np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
    assert 0.5 + below == pytest.approx(0.95, abs=6e-5)  # the table has 3 decimals


def test_table_ends_where_the_normal_begins() -> None:
    assert len(T95) == 29
    assert t95(30) == 1.699
    assert t95(31) == 1.645
    assert t95(1) == math.inf


def test_interval_by_hand() -> None:
    # mean 2, s = 1, n = 3: h = 2.920 / sqrt(3) = 1.6859
    assert estimate([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.68586, 3), abs=1e-5)


def test_one_seed_has_no_spread() -> None:
    assert standard_deviation([1.0]) is None
    assert estimate([1.0]).half_width == math.inf
