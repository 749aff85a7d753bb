"""What the first choice of a layer says about the next one's."""

import numpy as np
import pytest

from moejax.analysis.documents import shuffled
from moejax.analysis.predictability import Predictability
from tests.analysis.traces import trace, uniform


def measured(part) -> Predictability:
    predictability = Predictability(part.meta)
    predictability.add(part)
    return predictability


def test_a_function_of_the_lower_choice_is_predicted() -> None:
    below_T = np.arange(960) * 7 % 4
    both_TL = np.stack([below_T, (below_T + 1) % 4], 1)
    part = trace(both_TL[..., None], 4, document_T=np.arange(960) // 32)
    found = measured(part)
    assert found.accuracy().value[0] == 1 and found.information().value[0] == pytest.approx(1)
    assert found.most_frequent()[0] == 1 / 4 == found.accuracy().random[0]
    dealt = measured(shuffled(part, np.random.default_rng(0)))
    assert dealt.accuracy().value[0] < 0.35 and dealt.information().value[0] < 0.05


def test_a_table_is_asked_about_the_other_half() -> None:
    found = Predictability(trace(np.zeros((1, 2, 1)), 2).meta)
    # One half says 0 -> 1 (3 of 4) and 1 -> 0 (2 of 2); the other 0 -> 0 (5 of 6) and 1 -> 0 (1).
    found.joint_LHEE[0] = [[[1, 3], [2, 0]], [[5, 1], [1, 0]]]
    # The first table gets 1 + 1 of the other half's 7 right, the second 1 + 2 of the first's 6.
    assert found.accuracy().value[0] == (2 + 3) / 13
    # By frequency: a tie of 3 and 3 is taken as 0: 6 of 7; the other one says 0: 3 of 6.
    assert found.most_frequent()[0] == (6 + 3) / 13


def test_information_by_hand() -> None:
    found = Predictability(trace(np.zeros((1, 2, 1)), 2).meta)
    found.joint_LHEE[0, 0] = [[2, 0], [1, 1]]
    # H(lower) = ln 2; H(upper) of 3/4, 1/4 = 0.562335; H(both) of 1/2, 1/4, 1/4 = 1.5 ln 2.
    upper = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    want = (np.log(2) + upper - 1.5 * np.log(2)) / upper
    assert found.information().value[0] == pytest.approx(want)


def test_random_routing_hits_its_floors() -> None:
    found = measured(uniform(20_000, 17, 8, 1))
    accuracy, information = found.accuracy(), found.information()
    assert abs(accuracy.value.mean() - 1 / 8) < 4 * accuracy.value.std() / 4
    # 2 T MI is chi-squared of 49 degrees of freedom: 16 of them have a relative error of 0.05.
    assert information.value.mean() == pytest.approx(information.random[0], rel=0.2)


def test_one_layer_has_no_pairs_and_no_expert_is_no_choice() -> None:
    assert measured(uniform(64, 1, 4, 1)).accuracy().value.shape == (0,)
    none = measured(trace([[[0], [4]], [[4], [1]], [[0], [1]]], 4))
    assert none.joint_LHEE.sum() == 1
