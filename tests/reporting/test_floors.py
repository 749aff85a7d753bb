"""Floors of random routing against published tables, simulation and closed forms."""

import numpy as np
import pytest

from moejax.routing.floors import drop_floor, expected_normal_maximum, max_vio_floor

MAX_VIO = {  # tokens: E, K = (8,1) (8,2) (16,1) (16,2) (64,6) (64,8)
    512: (0.18, 0.12, 0.32, 0.22, 0.34, 0.28),
    2048: (0.088, 0.060, 0.16, 0.11, 0.165, 0.14),
    8192: (0.045, 0.029, 0.080, 0.053, 0.082, 0.070),
    65536: (0.016, 0.010, 0.028, 0.019, 0.029, 0.024),
}
DROPS = {  # (group, experts): percent dropped at cf .5 .75 1 1.25 1.5, K = 1
    (256, 8): (50, 25.4, 6.6, 0.5, 0.01),
    (512, 16): (50, 25.5, 6.8, 0.6, 0.02),
    (1024, 8): (50, 25.0, 3.3, 0, 0),
    (1024, 32): (50, 25.5, 6.9, 0.7, 0.03),
    (8192, 128): (50, 25.1, 5.0, 0.1, 0),
}


@pytest.mark.parametrize("tokens", MAX_VIO)
def test_max_vio_floor_is_within_6_percent_of_the_table(tokens: int) -> None:
    sizes = ((8, 1), (8, 2), (16, 1), (16, 2), (64, 6), (64, 8))
    got = [max_vio_floor(tokens, e, k) for e, k in sizes]
    np.testing.assert_allclose(got, MAX_VIO[tokens], rtol=0.06)


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 2), (32, 4)])
def test_max_vio_floor_matches_simulation(experts: int, k: int) -> None:
    random, tokens = np.random.default_rng(0), 1024
    seen = []
    for _ in range(100):
        chosen_TK = random.random((tokens, experts)).argsort(1)[:, :k]
        load_E = np.bincount(chosen_TK.ravel(), minlength=experts)
        seen.append(load_E.max() / load_E.mean() - 1)
    assert max_vio_floor(tokens, experts, k) == pytest.approx(np.mean(seen), rel=0.08)


def test_expected_maximum_of_normals() -> None:
    # E max of 1, 2, 3 normals: 0, 1/sqrt(pi), 3/(2 sqrt(pi)).
    got = [expected_normal_maximum(n) for n in (1, 2, 3)]
    np.testing.assert_allclose(got, [0, 1 / np.sqrt(np.pi), 1.5 / np.sqrt(np.pi)], atol=1e-6)


@pytest.mark.parametrize("size", DROPS)
def test_drop_floor_reproduces_the_table(size: tuple[int, int]) -> None:
    tokens, experts = size
    got = [100 * drop_floor(tokens, experts, 1, cf) for cf in (0.5, 0.75, 1, 1.25, 1.5)]
    np.testing.assert_allclose(got, DROPS[size], rtol=0.02, atol=0.13)


def test_drop_floor_matches_simulation_for_two_choices() -> None:
    random, tokens, experts = np.random.default_rng(1), 256, 8
    dropped = []
    for _ in range(200):
        chosen_TK = random.random((tokens, experts)).argsort(1)[:, :2]
        load_E = np.bincount(chosen_TK.ravel(), minlength=experts)
        dropped.append(np.maximum(load_E - 64, 0).sum() / (2 * tokens))
    assert drop_floor(tokens, experts, 2, 1.0) == pytest.approx(np.mean(dropped), rel=0.05)


def test_choosing_every_expert_is_always_balanced() -> None:
    assert max_vio_floor(100, 4, 4) == 0
    assert drop_floor(100, 4, 4, 1.0) == 0
    assert drop_floor(100, 4, 4, 0.5) == pytest.approx(0.5)


def test_impossible_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="experts=4 k=5"):
        max_vio_floor(100, 4, 5)
    with pytest.raises(ValueError, match="capacity factor 0"):
        drop_floor(100, 4, 1, 0)
