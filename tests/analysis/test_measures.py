"""All measures in one pass: wherever the trace is cut, the same figures."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.analysis.measures import measure
from tests.analysis.traces import cut, trace, uniform


def lively(tokens: int = 96):
    """Routing of up to 3 of 5 experts, none too, in documents of any length and two domains."""
    random = np.random.default_rng(5)
    expert_TLR = random.random((tokens, 3, 5)).argsort(-1)[..., :3]
    none_TLR = np.arange(3) >= random.integers(0, 4, (tokens, 3))[..., None]
    document_T = np.cumsum(random.random(tokens) < 0.15)
    return trace(
        np.where(none_TLR, 5, expert_TLR),
        5,
        document_T=document_T,
        domain_T=document_T % 3 - 1,
        domains=("x", "y"),
        token_T=random.integers(0, 9, tokens),
        target_T=random.integers(0, 9, tokens),
        predicted_T=random.integers(0, 12, tokens),
    )


WHOLE = measure([lively()]).figures()


@given(st.lists(st.integers(0, 96), max_size=8))
def test_figures_do_not_depend_on_where_the_trace_is_cut(places: list[int]) -> None:
    found = measure(cut(lively(), places)).figures()
    assert found.keys() == WHOLE.keys()
    for name, figure in found.items():
        for mine, whole in zip(figure, WHOLE[name], strict=True):
            if whole is not None:
                np.testing.assert_allclose(mine, whole, rtol=1e-12, err_msg=name)


def test_every_figure_of_random_routing_is_at_its_floor() -> None:
    document_T = np.arange(12_800) // 32
    columns = {"domain_T": document_T % 2, "domains": ("x", "y"), "document_T": document_T}
    ids_T = np.random.default_rng(9).integers(0, 40, 12_800)
    part = uniform(12_800, 6, 8, 2, predicted_T=ids_T, target_T=ids_T, **columns)
    found = measure([part]).figures()
    assert len(found) == 13
    for name, (value, random, control) in found.items():
        assert np.isfinite(value).all(), name
        # Co-activation's strongest partner is the best of seven, each at chance.
        room = 0.02 if name == "coactivation" else 0.01
        assert abs(value.mean() - random.mean()) < room + 0.2 * random.mean(), name
        assert control is None or abs(value.mean() - control.mean()) < room, name


def test_what_is_shuffled_loses_its_order() -> None:
    """Both layers: half a document at one expert, then half at another."""
    half_T = np.arange(6400) // 16
    expert_TL = np.stack([half_T % 5, half_T % 5], 1)
    found = measure([trace(expert_TL[..., None], 5, document_T=half_T // 2)]).figures()
    for name, dealt in (("repetition_first", 15 / 31), ("predictability", 1 / 2)):
        value, _, control = found[name]
        assert value.min() > 0.96 and control == pytest.approx(dealt, abs=0.05), name


def test_what_is_not_known_is_left_out() -> None:
    found = measure([dataclasses.replace(lively(), predicted_T=None)]).figures()
    assert WHOLE.keys() - found.keys() == {"vocabulary_predicted"}
    alone = uniform(64, 1, 4, 1, domain_T=np.zeros(64), domains=("x",))
    assert "domains" not in measure([alone]).figures()


def test_nothing_to_measure_is_said() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        measure([])
    with pytest.raises(ValueError, match="no layer with experts"):
        measure([trace(np.zeros((3, 0, 1)), 4)])
