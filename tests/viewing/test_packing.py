"""What the page is given is what was traced, to the bits it is given."""

import base64
import dataclasses

import numpy as np
import pytest

from moejax.viewing import pack
from moejax.viewing.packing import gate_of, quantised
from tests.viewing import made


def unpacked(packed: dict) -> np.ndarray:
    data = base64.b64decode(packed["data"])
    return np.frombuffer(data, f"<{packed['dtype']}").reshape(packed["shape"])


def scores_of(packed: dict) -> np.ndarray:
    low_TL, high_TL = (unpacked(packed[name]).astype(np.float32) for name in ("low", "high"))
    part_TLE = unpacked(packed["level"]).astype(np.float32) / 255
    value_TLE = low_TL[..., None] + (high_TL - low_TL)[..., None] * part_TLE
    gates = {"softmax": np.exp, "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "": lambda v: v}
    return gates[packed["gate"]](value_TLE)


@pytest.fixture(scope="module")
def panel():
    return made.panel(experts=6, layers=3)


def test_decisions_come_back_as_they_were(panel) -> None:
    trace, packed = panel.trace, pack([panel])["panels"][0]
    np.testing.assert_array_equal(unpacked(packed["expert"]), trace.expert_TLR)
    np.testing.assert_array_equal(unpacked(packed["weight"]), trace.weight_TLR.astype(np.float16))
    bits = np.unpackbits(unpacked(packed["dropped"]))[: trace.dropped_TLR.size]
    np.testing.assert_array_equal(bits.reshape(trace.dropped_TLR.shape), trace.dropped_TLR)
    np.testing.assert_allclose(unpacked(packed["entropy"]), trace.entropy_TL, rtol=1e-3)
    assert packed["layers"] == [1, 3, 5] and packed["experts"] == 6


def test_scores_of_chosen_experts_agree_with_the_weights(panel) -> None:
    packed = pack([panel])["panels"][0]
    there_TLR = panel.trace.expert_TLR < 6
    chosen_TLR, weight_TLR = unpacked(packed["chosen"]), unpacked(packed["weight"])
    np.testing.assert_allclose(chosen_TLR[there_TLR], weight_TLR[there_TLR], rtol=2e-3)


def test_no_room_is_kept_for_choices_that_nobody_makes(panel) -> None:
    """Where a token may have all experts, R is E."""
    trace = panel.trace
    wide = {
        name: np.pad(getattr(trace, name), ((0, 0), (0, 0), (0, 4)), constant_values=nothing)
        for name, nothing in (("expert_TLR", 6), ("weight_TLR", 0), ("dropped_TLR", False))
    }
    padded = dataclasses.replace(panel, trace=dataclasses.replace(trace, **wide))
    assert pack([padded]) == pack([panel])


def test_the_text_is_there_once(panel) -> None:
    text = pack([panel, panel])["text"]
    assert "".join(text["piece"]) == made.TEXT[:-1]
    np.testing.assert_array_equal(unpacked(text["document"]), panel.trace.document_T)
    np.testing.assert_array_equal(unpacked(text["domain"]), panel.trace.domain_T + 1)


LOGITS = np.random.default_rng(1).normal(size=(50, 3, 16)).astype(np.float32) * 2


@pytest.mark.parametrize(
    ("gate", "scores_TLE"),
    [
        ("softmax", np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)),
        ("sigmoid", 1 / (1 + np.exp(-LOGITS))),
        ("", np.maximum(LOGITS, 0)),
    ],
)
def test_eight_bits_keep_a_score(gate: str, scores_TLE: np.ndarray) -> None:
    packed = quantised(scores_TLE.astype(np.float16))
    assert packed["gate"] == gate
    found_TLE = scores_of(packed)
    if gate == "softmax":  # half a level of at most 12 nats: 2.4 %
        np.testing.assert_allclose(found_TLE, scores_TLE, rtol=0.026)
    else:  # half a level of the range, and float16
        range_TL1 = np.ptp(scores_TLE if not gate else LOGITS, axis=-1, keepdims=True)
        slope = 1 if not gate else 0.25  # the sigmoid's steepest
        assert np.all(np.abs(found_TLE - scores_TLE) <= slope * range_TL1 / 500 + 2e-3)


def test_equal_scores_and_zeros_are_no_trouble() -> None:
    even = np.full((2, 1, 4), 0.25, np.float16)
    np.testing.assert_allclose(scores_of(quantised(even)), even, rtol=1e-3)
    one_hot = np.eye(4, dtype=np.float16)[:, None]
    found = scores_of(quantised(one_hot))
    assert gate_of(one_hot) == "softmax" and np.abs(found - one_hot).max() < 1e-4


def test_a_long_training_is_thinned_and_keeps_its_ends() -> None:
    step_H = np.arange(1000, dtype=np.int32)
    long = made.History(step_H, np.ones((1000, 2, 4), np.float32))
    packed = pack([dataclasses.replace(made.panel(), history=long)])["panels"][0]["history"]
    assert packed["step"][0] == 0 and packed["step"][-1] == 999 and len(packed["step"]) == 240
    assert packed["load"]["shape"] == [240, 2, 4]


def test_two_checkpoints_of_one_run_are_told_from_two_runs() -> None:
    one = made.panel()
    assert not pack([one])["paired"]
    assert pack([one, made.panel(step=120)])["paired"]
    assert not pack([one, made.panel(run="none")])["paired"]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (made.panel(step=1, layers=3), "1 has 3 layers with experts, free, step 240 2"),
        (made.panel(step=1, tokens=30), "reads 30 tokens, free, step 240 66"),
    ],
)
def test_what_does_not_stand_side_by_side_is_refused(other, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pack([made.panel(), other])


def test_a_trace_without_scores_is_refused() -> None:
    bare = dataclasses.replace(made.panel().trace, scores_TLE=None)
    with pytest.raises(ValueError, match="scores=True"):
        pack([dataclasses.replace(made.panel(), trace=bare)])
