"""Draws: the nucleus by hand, greedy, and seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.generation.sampling import Sampling, checked, nucleus, sample

# Probabilities of one row, not in order.
PROBS = (0.15, 0.5, 0.05, 0.3)


def log_probs(*rows: tuple[float, ...]) -> jax.Array:
    return jnp.log(jnp.asarray(rows or (PROBS,)))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        # Falling: .5, .3, .15, .05. Before each of them: 0, .5, .8, .95.
        (0.4, [1]),
        (0.6, [1, 3]),
        (0.79, [1, 3]),  # .5 + .3 is enough
        (0.9, [0, 1, 3]),
        (0.97, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
        (1e-6, [1]),  # never none
    ],
)
def test_the_nucleus_by_hand(top_p: float, kept: list[int]) -> None:
    assert np.flatnonzero(nucleus(log_probs(), top_p)[0]).tolist() == kept


def test_equal_probabilities_are_cut_by_their_place() -> None:
    # Four of .25, before them 0, .25, .5, .75: two reach .5 and are enough.
    assert nucleus(jnp.zeros((1, 4)), 0.5)[0].tolist() == [True, True, False, False]


def many(temperature: float, top_p: float, rows: int = 4000, first: int = 0) -> np.ndarray:
    how = Sampling(temperature, top_p, jnp.arange(first, first + rows))
    return np.asarray(sample(jnp.tile(log_probs(), (rows, 1)), how, 0))


@pytest.mark.parametrize(
    ("temperature", "top_p", "want"),
    [
        (1.0, 1.0, PROBS),
        # The nucleus of .5 and .3, divided by their sum.
        (1.0, 0.7, (0, 0.625, 0, 0.375)),
        # Squares, .0225 .25 .0025 .09, divided by their sum .365.
        (0.5, 1.0, (0.0616, 0.6849, 0.0068, 0.2466)),
    ],
)
def test_draws_come_as_often_as_they_should(temperature, top_p, want) -> None:
    share_V = np.bincount(many(temperature, top_p), minlength=4) / 4000
    # Three standard deviations: 3 sqrt(.25 / 4000) = .024.
    np.testing.assert_allclose(share_V, want, atol=0.024)
    assert np.all(share_V[np.asarray(want) == 0] == 0)


def test_temperature_0_is_greedy() -> None:
    assert set(many(0.0, 1.0, 8)) == set(many(0.0, 0.1, 8)) == {1}
    assert set(many(1e-4, 1.0, 8)) == {1}


def test_a_row_s_draws_are_its_seed_s() -> None:
    drawn = many(1.0, 1.0, 64)
    np.testing.assert_array_equal(many(1.0, 1.0, 32, first=32), drawn[32:])
    assert np.any(many(1.0, 1.0, 64, first=1000) != drawn)
    how = Sampling(1.0, 1.0, jnp.zeros(1, jnp.int32))
    each_draw = jax.vmap(lambda count: sample(log_probs(), how, count))(jnp.arange(32))
    assert len(set(each_draw[:, 0].tolist())) == 4


@pytest.mark.parametrize(
    ("temperature", "top_p", "message"),
    [
        (-0.5, 1.0, r"temperature=-0\.5 must be 0 \(greedy\) or above"),
        (float("nan"), 1.0, "temperature=nan"),
        (1.0, 0.0, r"top_p=0\.0 must be in \(0, 1\]"),
        (1.0, 1.5, r"top_p=1\.5"),
    ],
)
def test_senseless_sampling_is_refused(temperature: float, top_p: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(temperature, top_p)
