"""What an earlier checkpoint chose of the last one's choices."""

import numpy as np
import pytest

from moejax.analysis.saturation import Saturation
from tests.analysis.traces import one_layer, uniform


def measured(earlier, last) -> Saturation:
    saturation = Saturation(last.meta)
    saturation.add(earlier, last)
    return saturation


def test_common_choices_by_hand() -> None:
    # The last one's assignments: 0 1, 2, none, 3 2. Found before: 1, none of them, -, both.
    last = one_layer([[0, 1], [2, 4], [4, 4], [3, 2]], 4)
    earlier = one_layer([[1, 3], [0, 1], [0, 1], [2, 3]], 4)
    found = measured(earlier, last).saturation()
    assert found.value[0] == 3 / 5 and found.random[0] == 2 / 4
    assert measured(last, last).saturation().value[0] == 1


def test_random_routing_hits_its_floor() -> None:
    a, b = uniform(8000, 2, 8, 2, seed=1), uniform(8000, 2, 8, 2, seed=2)
    b = one_layer(b.expert_TLR[:, 0], 8, token_T=a.token_T)
    a = one_layer(a.expert_TLR[:, 0], 8, token_T=a.token_T)
    found = measured(a, b).saturation()
    assert found.random[0] == 1 / 4
    assert abs(found.value[0] - 1 / 4) < 4 * np.sqrt(3 / 16 / 16_000)


def test_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2 tokens"):
        measured(one_layer([[0]] * 3, 4), one_layer([[0]] * 2, 4))
