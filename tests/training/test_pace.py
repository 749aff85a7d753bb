"""How long a comparison will still take."""

import pytest

from moejax.config import Config
from moejax.training.pace import Pace
from tests.tiny import tiny


def run(seed: int = 0, rate: float = 1e-2, steps: int = 100) -> Config:
    return tiny(train={"seed": seed, "steps": steps}, optimizer={"learning_rate": rate})


def test_nothing_is_said_before_a_run_is_done() -> None:
    assert Pace().left([run()]) is None


def test_a_program_is_started_once() -> None:
    pace = Pace()
    pace.took(run(), seconds=30.0, trained=10.0)
    assert pace.left([run(seed=1), run(seed=2)]) == pytest.approx(20.0)
    # A learning rate is an argument, a warm-up is not: 20 to start, once, and twice 10.
    assert pace.left([run(rate=1e-3), run(1, rate=1e-3)]) == pytest.approx(20.0)
    warm = [tiny(train={"seed": seed, "steps": 100}, optimizer={"warmup": 7}) for seed in (1, 2)]
    assert pace.left(warm) == pytest.approx(40.0)


def test_evaluations_count_once_they_are_known() -> None:
    pace = Pace()
    pace.took(run(), seconds=30.0, trained=10.0)
    pace.took(run(1), seconds=12.0, trained=10.0)
    assert pace.left([run(2)]) == pytest.approx(12.0)


def test_a_new_arm_takes_its_flops_at_the_usual_pace() -> None:
    pace = Pace()
    pace.took(run(), seconds=30.0, trained=10.0)
    assert pace.left([run(steps=300)]) == pytest.approx(20.0 + 30.0)


def test_a_run_that_was_cut_counts_its_earlier_steps() -> None:
    pace = Pace()
    pace.took(run(), seconds=4.0, trained=10.0)
    assert pace.left([run(1), run(rate=1e-3)]) == pytest.approx(20.0)
