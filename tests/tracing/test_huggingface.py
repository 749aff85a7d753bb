"""Router outputs of transformers, read: the experts and weights are those that its own routers
chose. The numbers are those of `huggingface_outputs.py`."""

import json

import numpy as np
import pytest

from moejax.tracing.huggingface import Gate, gate_of, trace_of_outputs
from tests.tracing.huggingface_outputs import FILE, MODELS

OUTPUTS = json.loads(FILE.read_text())
# Row 0 begins with two padded tokens, row 1 ends with one; the last real one has no target.
PLACES = [2, 3, 4, 6, 7, 8, 9]


def read(name: str):
    found = OUTPUTS[name]
    keys = ("router_logits", "input_ids", "attention_mask", "bias_LE", "predicted")
    logits, ids, mask, bias_LE, guesses = (found[key] for key in keys)
    gate = gate_of(found["config"])
    return found, trace_of_outputs(logits, ids, gate, mask, bias_LE=bias_LE, predicted=guesses)


@pytest.mark.parametrize("name", MODELS)
def test_experts_and_weights_are_those_that_the_model_chose(name: str) -> None:
    found, trace = read(name)
    assert trace.expert_TLR.shape == (7, 2, 2) and trace.meta.experts == 8
    ours_TLK = np.sort(trace.expert_TLR, -1)
    theirs_LTK = np.array(found["expert_LTK"])
    np.testing.assert_array_equal(ours_TLK, np.sort(theirs_LTK, -1)[:, PLACES].swapaxes(0, 1))
    weights = np.zeros((2, 12, 8))
    np.put_along_axis(weights, theirs_LTK, np.array(found["weight_LTK"]), -1)
    want_TLE = weights[:, PLACES].swapaxes(0, 1)
    got_TLK = np.take_along_axis(want_TLE, trace.expert_TLR.astype(int), -1)
    np.testing.assert_allclose(trace.weight_TLR, got_TLK, rtol=1e-4)
    assert not trace.dropped_TLR.any() and trace.meta.source == "transformers"


def test_the_bias_and_the_groups_matter() -> None:
    found, trace = read("DeepseekV3")
    args = found["router_logits"], found["input_ids"]
    free = Gate(2, "sigmoid", True, 2.5)
    for other in (
        trace_of_outputs(*args, gate_of(found["config"]), found["attention_mask"]),
        trace_of_outputs(*args, free, found["attention_mask"], bias_LE=found["bias_LE"]),
    ):
        assert np.any(np.sort(other.expert_TLR, -1) != np.sort(trace.expert_TLR, -1))
    assert np.any(trace.margin_TL < 0)  # overruled scores


def test_tokens_targets_positions_and_documents() -> None:
    found, trace = read("Mixtral")
    flat = np.array(found["input_ids"]).reshape(-1)
    assert trace.token_T.tolist() == flat[PLACES].tolist()
    assert trace.target_T.tolist() == flat[np.array(PLACES) + 1].tolist()
    guesses = np.array(found["predicted"]).reshape(-1)
    assert trace.predicted_T is not None and trace.predicted_T.tolist() == guesses[PLACES].tolist()
    assert trace.position_T.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert trace.document_T.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert set(trace.domain_T.tolist()) == {-1}


def test_entropy_and_margin_by_hand() -> None:
    logits = np.log([[0.5, 0.25, 0.125, 0.125], [0.25] * 4])
    trace = trace_of_outputs([logits], [[1, 2]], Gate(2), layers=(5,))
    assert trace.meta.layers == (5,) and trace.expert_TLR.tolist() == [[[0, 1]]]
    np.testing.assert_allclose(trace.weight_TLR, [[[0.5, 0.25]]], rtol=1e-6)
    np.testing.assert_allclose(trace.entropy_TL, [[1.75 * np.log(2)]], rtol=1e-6)
    np.testing.assert_allclose(trace.margin_TL, [[0.125]], rtol=1e-6)
    np.testing.assert_allclose(trace.scores_TLE, [[[0.5, 0.25, 0.125, 0.125]]], rtol=1e-3)


def test_bad_input_is_one_line() -> None:
    for logits, message in (
        ([], "no router logits: give output_router_logits=True"),
        (
            [np.zeros((3, 4))],
            r"router_logits\[0\] is of shape \(3, 4\), .*: \(2, experts\)",
        ),
        ([np.full((2, 4), 0.25)], r"router_logits\[0\] are probabilities, not logits"),
    ):
        with pytest.raises(ValueError, match=message):
            trace_of_outputs(logits, [[1, 2]], Gate(2))
    with pytest.raises(ValueError, match="how model_type='gpt2' weighs its experts is not known"):
        gate_of({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="unknown scores 'relu'"):
        Gate(2, "relu")
