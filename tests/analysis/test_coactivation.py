"""Which experts meet at a token: all pairs, by hand and by chance."""

import numpy as np
import pytest

from moejax.analysis.coactivation import Coactivation
from tests.analysis.traces import one_layer, uniform


def measured(part) -> Coactivation:
    coactivation = Coactivation(part.meta)
    coactivation.add(part)
    return coactivation


def test_all_pairs_of_a_tokens_experts_count() -> None:
    # (0 1 2): pairs 01, 02 and 12, not only the neighbours in rank. (0 1): pair 01. (0): none.
    found = measured(one_layer([[0, 1, 2], [1, 0, 4], [0, 4, 4]], 4))
    assert found.together_LEE[0].tolist() == [[3, 2, 1, 0], [2, 2, 1, 0], [1, 1, 1, 0], [0] * 4]
    share_EE = found.share_LEE[0]
    assert share_EE[:3].tolist() == [[0, 2 / 3, 1 / 3, 0], [1, 0, 1 / 2, 0], [1, 1, 0, 0]]
    assert np.isnan(share_EE[3, :3]).all()  # nobody chose expert 3
    strongest = found.strongest()
    assert strongest.value[0] == pytest.approx((2 / 3 + 1 + 1) / 3)
    # An assignment has (2 + 1 + 0 weighed by 3, 2, 1 assignments) = 8 / 6 others beside it.
    assert strongest.random[0] == pytest.approx(8 / 6 / 3)


def test_rows_sum_to_the_other_choices() -> None:
    part = uniform(512, 2, 8, 3)
    np.testing.assert_allclose(measured(part).share_LEE.sum(-1), 2.0)


def test_random_routing_meets_by_chance_and_pairs_do_not() -> None:
    found = measured(uniform(20_000, 2, 8, 2)).strongest()
    np.testing.assert_allclose(found.random, 1 / 7)
    # The best of seven partners at 5,000 tokens an expert: a few standard errors of 0.005 above.
    assert (found.value < 1 / 7 + 0.02).all() and (found.shuffled < 1 / 7 + 0.01).all()
    pair = measured(one_layer([[0, 1], [2, 3]] * 8, 4)).strongest()
    assert pair.value[0] == 1 and pair.shuffled[0] == pytest.approx(1 / 3)
