"""Does the id decide? By hand, where it does, and where ids are dealt anew."""

import numpy as np
import pytest

from moejax.analysis.vocabulary import Vocabulary
from tests.analysis.traces import one_layer, uniform


def measured(part, ids: str = "input") -> Vocabulary:
    vocabulary = Vocabulary(part.meta, ids)
    vocabulary.add(part)
    return vocabulary


def test_shared_experts_by_hand() -> None:
    # Id 5: (0 1) (0 2) (0 1): 0 with both others, 1 with one, 2 with none: 2*3/2 + 2/2 = 4 of 6.
    # Id 3: (2 3) (0 1): nothing in common: 0 of 4. Id 9 occurs once and says nothing.
    experts = [[0, 1], [0, 2], [0, 1], [2, 3], [0, 1], [1, 3]]
    found = measured(one_layer(experts, 4, token_T=[5, 5, 5, 3, 3, 9]))
    assert found.load_VLE[5, 0].tolist() == [3, 2, 1, 0]
    assert found.specialisation().value[0] == 4 / 10
    assert found.specialisation().random[0] == 2 / 4
    # Any two of six tokens, loads 4 4 2 2: (12 + 12 + 2 + 2) / (5 * 12).
    assert found.specialisation().shuffled[0] == 28 / 60
    assert found.covered() == 5 / 6
    assert found.favourites(0, 0, most=2, least=2) == [(5, 1.0), (3, 0.5)]


def test_the_control_is_the_mean_over_all_deals_of_the_ids() -> None:
    random = np.random.default_rng(0)
    expert_TR = random.choice([0, 0, 1, 2], (300, 1))
    ids_T = np.repeat([0, 1, 2], 100)
    parts = [one_layer(expert_TR, 3, token_T=random.permutation(ids_T)) for _ in range(40)]
    dealt = [measured(part).specialisation() for part in parts]
    mean = np.mean([d.value[0] for d in dealt])
    assert mean == pytest.approx(dealt[0].shuffled[0], abs=0.002)


@pytest.mark.parametrize(("ids", "column"), [("input", "token_T"), ("target", "target_T")])
def test_a_function_of_the_id_has_1(ids: str, column: str) -> None:
    part = uniform(2000, 2, 8, 2)
    table_VR = np.argsort(np.random.default_rng(3).random((40, 8)), 1)[:, :2]
    part = one_layer(table_VR[part.token_T], 8, **{column: part.token_T})
    found = measured(part, ids).specialisation()
    assert found.value[0] == 1 and found.shuffled[0] < 0.5
    assert measured(part, "predicted").count_V.sum() == 0


def test_random_routing_hits_its_floors() -> None:
    found = measured(uniform(16_000, 4, 8, 2)).specialisation()
    assert found.random[0] == 1 / 4
    np.testing.assert_allclose(found.value, 1 / 4, atol=0.003)
    np.testing.assert_allclose(found.shuffled, 1 / 4, atol=0.001)
