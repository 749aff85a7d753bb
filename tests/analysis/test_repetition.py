"""Consecutive tokens at the same expert: by hand, by chance, and with the order drawn."""

import numpy as np
import pytest

from moejax.analysis.documents import shuffled, whole_documents
from moejax.analysis.repetition import Repetition
from moejax.routing.floors import overlap_floor
from tests.analysis.traces import cut, one_layer, trace, uniform


def measured(part) -> Repetition:
    repetition = Repetition(part.meta)
    repetition.add(part)
    return repetition


def test_pairs_by_hand() -> None:
    # Document 0: 0 1 | 1 0 | 2 3: no first choice repeats, the first pair overlaps, 10 | 23 not.
    # Document 1: 2 3 | 2 . | . . | 2 3: the first pair repeats; a token of no expert has no pairs.
    experts = [[0, 1], [1, 0], [2, 3], [2, 3], [2, 4], [4, 4], [2, 3]]
    found = measured(one_layer(experts, 4, document_T=[0, 0, 0, 1, 1, 1, 1]))
    assert found.pairs_L[0] == 3 and found.first().value[0] == 1 / 3
    assert found.any().value[0] == 2 / 3
    chance = [overlap_floor(4, 2, 2), overlap_floor(4, 2, 2), overlap_floor(4, 2, 1)]
    assert found.any().random[0] == pytest.approx(np.mean(chance))
    assert found.first().random[0] == 1 / 4


def test_random_routing_hits_its_floors() -> None:
    found = measured(uniform(32_000, 2, 8, 2))
    for value, random, _ in (found.first(), found.any()):
        sampling = np.sqrt(random * (1 - random) / found.pairs_L)
        assert (np.abs(value - random) < 4 * sampling).all()


def test_halves_of_documents_fall_when_shuffled() -> None:
    """Each document: half at one expert, then half at another. All but one of 31 pairs repeat; with
    the order drawn, as many as two of a document's tokens agree: 15 / 31."""
    half_T = np.arange(6400) // 16
    part = one_layer((half_T % 5)[:, None], 5, document_T=half_T // 2)
    assert measured(part).first().value[0] == 30 / 31
    dealt = measured(shuffled(part, np.random.default_rng(0))).first().value[0]
    assert dealt == pytest.approx(15 / 31, abs=0.02)


def test_the_deal_keeps_documents_and_tears_layers_apart() -> None:
    expert_T = np.tile(np.arange(8), 40)
    both = trace(np.stack([expert_T, expert_T], 1)[..., None], 8, document_T=np.arange(320) // 32)
    dealt = shuffled(both, np.random.default_rng(1))
    for document in range(10):
        here = slice(32 * document, 32 * document + 32)
        assert (np.sort(dealt.expert_TLR[here], 0) == np.sort(both.expert_TLR[here], 0)).all()
    assert (dealt.expert_TLR[:, 0] != dealt.expert_TLR[:, 1]).mean() > 0.7
    assert (dealt.token_T == both.token_T).all()


def test_no_document_is_cut() -> None:
    whole = one_layer(np.arange(7)[:, None], 8, document_T=[3, 3, 5, 5, 5, 6, 9])
    for places in ([1], [2, 3, 4], [1, 1, 5, 6], []):
        parts = list(whole_documents(cut(whole, places)))
        assert np.concatenate([p.expert_TLR for p in parts]).ravel().tolist() == list(range(7))
        ends = [(a.document_T[-1], b.document_T[0]) for a, b in zip(parts, parts[1:], strict=False)]
        assert all(a != b for a, b in ends)
    assert list(whole_documents([])) == list(whole_documents([whole[:0]])) == []
