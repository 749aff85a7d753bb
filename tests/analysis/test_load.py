"""Load, MaxVio and dead experts of traces made by hand."""

import numpy as np
import pytest

from moejax.analysis.load import Load
from moejax.routing.floors import max_vio_floor, overlap_floor
from tests.analysis.traces import one_layer, uniform

NONE = 4


def loaded(expert_TR, **columns) -> Load:
    part = one_layer(expert_TR, 4, **columns)
    load = Load(part.meta)
    load.add(part)
    return load


def test_a_load_by_hand() -> None:
    # Expert 0 from three tokens, 1 from two, 2 from one; the last token has nobody.
    load = loaded([[0, 1], [0, 1], [0, 2], [NONE, NONE]])
    assert load.tokens == 4
    assert load.load_LE.tolist() == [[3, 2, 1, 0]]
    assert load.first_LE.tolist() == [[3, 0, 0, 0]]
    assert load.size_LX.tolist() == [[1, 0, 3, 0, 0]]
    assert load.mean_size_L[0] == 6 / 4
    assert load.company_L[0] == 2  # of tokens with experts: 3 * 2^2 / 6
    assert load.max_vio().value[0] == pytest.approx(3 / 1.5 - 1)
    # The floor is that of three tokens which all have two: the fourth assigns nothing.
    assert load.max_vio().random[0] == pytest.approx(max_vio_floor(3, 4, 2))
    dead = load.dead()
    assert dead.value[0] == 1 / 4
    assert dead.random[0] == pytest.approx((1 - 2 / 4) ** 3)


def test_a_token_with_all_experts_leaves_none_to_chance() -> None:
    load = loaded([[0, 1, 2, 3], [0, 1, 2, 3]])
    assert load.dead().random[0] == 0
    assert load.max_vio() == (0.0, 0.0, None)


def test_starved_experts_have_less_than_a_hundredth_of_the_mean() -> None:
    # 800 tokens: mean 200, so one assignment is starved and two are not.
    load = loaded([[0]] * 797 + [[1]] + [[2]] * 2)
    assert load.starved()[0] == 2 / 4 and load.dead().value[0] == 1 / 4


def test_drops_are_counted_apart() -> None:
    load = loaded([[0, 1], [0, 2]], dropped_TLR=[[[False, False]], [[True, False]]])
    assert load.load_LE.tolist() == [[2, 1, 1, 0]] and load.kept_LE.tolist() == [[1, 1, 1, 0]]
    assert load.dropped()[0] == 1 / 4


def test_a_layer_that_routes_nothing_is_not_a_number() -> None:
    load = loaded([[NONE], [NONE]])
    assert np.isnan([load.max_vio().value[0], load.max_vio().random[0], load.dropped()[0]]).all()
    assert load.dead() == (1.0, 1.0, None)


def test_more_than_31_bits_of_assignments() -> None:
    load = loaded([[0], [1], [2], [3]])
    load.load_LE *= 2**33
    load.size_LX *= 2**33
    assert load.max_vio().value[0] == 0


def test_random_routing_hits_its_floors() -> None:
    part = uniform(8192, 16, 16, 2)
    load = Load(part.meta)
    load.add(part)
    for name in ("max_vio", "variation", "entropy"):
        value, random, _ = getattr(load, name)()
        # 16 layers are 16 draws: five standard errors.
        assert abs(value.mean() - random.mean()) < 5 * value.std() / 4 + 1e-6, name


def test_overlap_by_chance() -> None:
    assert overlap_floor(8, 2, 2) == pytest.approx(0.464, abs=5e-4)
    assert overlap_floor(8, 0, 2) == 0 and overlap_floor(4, 3, 2) == 1
