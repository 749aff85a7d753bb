"""Hand-made loads whose division among experts is known."""

import numpy as np
import pytest

from moejax.analysis import domains
from moejax.analysis.domains import Domains, by_domain, recovered, shuffled, specialisation
from moejax.data import markov
from tests.analysis.traces import one_layer, trace, uniform
from tests.oracle import case, check


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


def test_each_layer_is_matched_in_the_best_way() -> None:
    load_GLE = np.array([[[1, 1], [1, 3]], [[1, 1], [4, 0]]])
    assert recovered(load_GLE).tolist() == [1 / 2, (3 / 4 + 1) / 2]


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


def measured(part) -> Domains:
    found = Domains(part.meta)
    found.add(part)
    return found


def test_domains_of_a_trace_by_hand() -> None:
    # Documents: x (0 1)(0 2), y (2 .)(. .), an unknown one (3 3).
    experts = [[0, 1], [0, 2], [2, 4], [4, 4], [3, 1]]
    part = one_layer(
        *(experts, 4),
        document_T=[0, 0, 1, 1, 2],
        domain_T=[0, 0, 1, 1, -1],
        domains=("x", "y", "z"),
    )
    found = measured(part)
    assert found.load_GLE[:, 0].tolist() == [[2, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert found.share_GLE()[:2, 0].tolist() == [[1, 0.5, 0.5, 0], [0, 0, 0.5, 0]]
    # Pooled 2 1 2 0 of 5; x is 2 1 1 0 of 4: off by (0.1 0.05 0.15) / 2; y by (0.4 0.2 0.6) / 2.
    assert found.specialisation().value[0] == pytest.approx((0.15 + 0.6) / 2)
    value_GL, floor_GL = found.max_vio()
    assert value_GL[:2, 0].tolist() == [1, 3] and np.isnan(value_GL[2, 0])
    assert np.isfinite(floor_GL[:2]).all() and np.isnan(floor_GL[2, 0])


def test_random_routing_hits_its_floor_and_its_control() -> None:
    document_T = np.arange(16_384) // 32
    domain_T = np.repeat([0, 1, 0, 2], 4096)
    part = uniform(16_384, 8, 8, 2, document_T=document_T, domain_T=domain_T, domains="abc")
    value, random, control = measured(part).specialisation()
    assert control is not None
    assert value.mean() == pytest.approx(random.mean(), rel=0.15)
    assert control.mean() == pytest.approx(random.mean(), rel=0.15)


def test_of_many_documents_a_sample_makes_the_control(monkeypatch) -> None:
    document_T = np.arange(16_384) // 8
    topic_T = np.random.default_rng(0).integers(0, 4, 2048)[document_T]  # says nothing of domains
    columns = {"document_T": document_T, "domain_T": document_T % 2, "domains": "ab"}
    part = one_layer(topic_T[:, None], 4, **columns)
    whole = measured(part).specialisation().shuffled
    monkeypatch.setattr(domains, "KEPT", 256)
    assert measured(part).specialisation().shuffled[0] == pytest.approx(whole[0], rel=0.4)


def test_the_known_sources_are_found_where_an_expert_serves_each() -> None:
    """Four chains of the Markov corpus. Upper layer: by the chain. Lower: by the letter's group,
    which two chains share, so that each chain is at two of four experts."""
    text = [(chain, letter) for chain in range(4) for letter in markov.write(chain, 0)[:256]]
    group_T = [[g for g, letters in enumerate(markov.GROUPS) if x in letters][0] for _, x in text]
    chain_T = np.array([chain for chain, _ in text])
    expert_TL = np.stack([group_T, chain_T], 1)
    columns = {"document_T": np.arange(1024) // 32, "domain_T": chain_T, "domains": markov.CHAINS}
    found = measured(trace(expert_TL[..., None], 4, **columns))
    value, _, control = found.specialisation()
    assert control is not None
    # Of the letter: shares 1/2, 1/2 against 1/4 each: a distance of 1/2; of the chain 3/4.
    assert value == pytest.approx([0.5, 0.75], abs=0.05)
    assert (control < 0.25).all()
    assert recovered(found.load_GLE) == pytest.approx([0.5, 1.0], abs=0.05)


@pytest.mark.parametrize("model", ["olmoe", "mixtral"])
def test_loads_of_trained_models_by_domain(model: str) -> None:
    found = case(f"routing_counts/{model}_routing_counts")
    inputs, names = found["inputs"], tuple(found["inputs"]["counts"])
    part = one_layer([[0]], inputs["E"], domains=names, domain_T=[0])
    measure = Domains(part.meta)
    measure.load_GLE = np.array([inputs["counts"][name] for name in names])
    measure.token_G = np.full(len(names), inputs["tokens"])
    value_GL, floor_GL = measure.max_vio()
    for name, value_L, share_LE in zip(names, value_GL, measure.share_GLE(), strict=True):
        want = found["expected"][name]
        check(found, "max_violation", value_L, [row["max_violation"] for row in want])
        check(found, "busiest", share_LE.max(-1), [row["busiest_share_of_tokens"] for row in want])
    assert (value_GL > floor_GL).all() and (floor_GL < 0.02).all()
    np.testing.assert_allclose(measure.share_GLE().sum(-1), inputs["K"])
    # What the paper says: OLMoE's experts divide the domains in every layer, Mixtral's hardly do.
    found_L = specialisation(measure.load_GLE)
    assert found_L.min() > 0.15 if model == "olmoe" else found_L.max() < 0.05
