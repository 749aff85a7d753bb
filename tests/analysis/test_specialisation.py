"""Hand-made loads whose division among experts is known."""

import numpy as np

from moejax.analysis.specialisation import by_domain, recovered, shuffled, specialisation


def loads(*rows: list[int]) -> np.ndarray:
    """Rows of one layer, [B, 1, E]."""
    return np.array(rows)[:, None]


def test_rows_are_added_up_by_domain_and_padding_is_left_out() -> None:
    load_BLE = loads([1, 2], [3, 4], [5, 6], [7, 8])
    found = by_domain(load_BLE, np.array([1, 0, 1, -1]), 3)
    assert found.tolist() == [[[3, 4]], [[6, 8]], [[0, 0]]]


def test_experts_of_their_own() -> None:
    load_GLE = loads([8, 0, 0], [0, 0, 8])
    assert specialisation(load_GLE) == 0.5 == 1 - 1 / len(load_GLE)
    assert recovered(load_GLE) == 1


def test_domains_that_use_the_experts_alike() -> None:
    load_GLE = loads([3, 1], [6, 2])
    assert specialisation(load_GLE) == 0
    assert recovered(load_GLE) == 0.5  # 3/4 of one, 1/4 of the other


def test_the_best_layer_counts_and_the_best_way_to_match() -> None:
    load_GLE = np.array([[[1, 1], [1, 3]], [[1, 1], [4, 0]]])
    assert recovered(load_GLE) == (3 / 4 + 1) / 2


def test_chance_is_what_labels_in_any_order_give() -> None:
    random = np.random.default_rng(0)
    domain_B = np.repeat([0, 1], 32)
    topic_BLE = random.multinomial(64, [0.25] * 4, size=(64, 1))  # knows nothing of domains
    floor = shuffled(topic_BLE, domain_B, 2)
    assert 0 < floor < 0.05
    assert abs(specialisation(by_domain(topic_BLE, domain_B, 2)) - floor) < 0.05
    own_BLE = np.where(domain_B[:, None, None] == 0, [[32, 32, 0, 0]], [[0, 0, 32, 32]])
    assert specialisation(by_domain(own_BLE, domain_B, 2)) == 0.5
    assert shuffled(own_BLE, domain_B, 2) < 0.2
    assert shuffled(own_BLE, domain_B, 2) == shuffled(own_BLE, domain_B, 2)  # always the same
