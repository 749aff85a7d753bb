"""Traces of a saved run, against its evaluation and against the model asked by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.tracing import concatenate, open_trace
from moejax.training.recording import trace_meta
from moejax.training.saved import open_run
from moejax.training.traced import trace_text, traces, validation_batches, write_trace
from tests import tiny


@pytest.fixture(scope="module")
def run(finished):
    return open_run(finished[0], progress=False)


@pytest.fixture(scope="module")
def traced(run):
    """Two batches, of which the second has padded rows."""
    return concatenate(list(traces(run, validation_batches(run, 12), predicted=True)))


def test_a_trace_holds_the_real_tokens_in_the_order_of_the_text(run, traced) -> None:
    batches = validation_batches(run, 12)
    for name, rows in (("token_T", "tokens_BS"), ("target_T", "targets_BS")):
        want = [getattr(b, rows)[b.valid_BS] for b in batches]
        np.testing.assert_array_equal(getattr(traced, name), np.concatenate(want))
    assert traced.meta.domains == run.dataset.domains == ("code", "prose")
    assert traced.meta.layers == (0, 1) and traced.meta.tokenizer == "bytes"
    domains = [np.broadcast_to(b.domain_B[:, None], b.valid_BS.shape)[b.valid_BS] for b in batches]
    np.testing.assert_array_equal(traced.domain_T, np.concatenate(domains))
    step_T = np.diff(traced.document_T)
    assert set(step_T.tolist()) == {0, 1} and traced.scores_TLE is None
    # Positions count on inside a document, from where it or the row begins.
    np.testing.assert_array_equal(np.diff(traced.position_T)[step_T == 0], 1)
    assert not np.any(traced.position_T[1:][step_T == 1])


def test_a_trace_counts_what_evaluation_counts(run, finished) -> None:
    whole = concatenate(list(traces(run, validation_batches(run, 16))))
    assert len(whole) == finished[1]["eval"]["tokens"]
    load_LE = np.stack([np.bincount(whole.expert_TLR[:, i].ravel(), minlength=5) for i in (0, 1)])
    share_LE = load_LE[:, :4] / load_LE.sum(1, keepdims=True)
    np.testing.assert_allclose(share_LE, finished[1]["eval"]["load_LE"], atol=1e-6)
    assert not whole.dropped_TLR.any() and np.all(whole.expert_TLR < 4)


def test_a_text_is_traced_as_the_model_routes_it(run) -> None:
    text = "def f(x):\n    return x\n" * 3  # 69 bytes in rows of 32
    trace = trace_text(run, text)
    assert bytes(trace.token_T.tolist()).decode() == text
    assert trace.target_T.tolist() == [*trace.token_T[1:].tolist(), 0]
    assert trace.position_T.tolist() == [*range(32), *range(32), *range(5)]
    assert trace.document_T.tolist() == [0] * 32 + [1] * 32 + [2] * 5
    assert set(trace.domain_T.tolist()) == {-1}
    row_BS = jnp.asarray(trace.token_T[None, :32])
    state = run.state.router_state
    with jax.set_mesh(jax.make_mesh((1,), ("alone",), devices=jax.devices()[:1])):
        one = jax.device_put((run.state, row_BS), jax.devices()[0])
    model = run._replace(state=one[0]).model()
    logits_BSV, stats = model(one[1], router_state=one[0].router_state, record=True)
    assert state is not None
    made = stats.decisions
    np.testing.assert_array_equal(trace.expert_TLR[:32], jnp.swapaxes(made.expert_TR[:, 0], 0, 1))
    np.testing.assert_array_equal(trace.predicted_T[:32], logits_BSV[0].argmax(-1))
    for got, want, tolerance in (
        (trace.weight_TLR, made.weight_TR, 1e-5),
        (trace.entropy_TL, made.entropy_T, 1e-5),
        (trace.margin_TL, made.margin_T, 1e-5),
        (trace.scores_TLE, made.scores_TE, 1e-3),
    ):
        np.testing.assert_allclose(got[:32], jnp.swapaxes(want[:, 0], 0, 1), atol=tolerance)


def test_a_written_trace_is_the_one_that_was_made(run, traced, tmp_path) -> None:
    assert write_trace(run, validation_batches(run, 12), tmp_path) == len(traced)
    there = open_trace(tmp_path)
    assert there.last == 2 and there.meta == traced.meta
    for name, column in there.read().columns():
        np.testing.assert_array_equal(column, getattr(traced, name))


def test_bad_input_is_one_line(run) -> None:
    with pytest.raises(ValueError, match="the text holds no token; give some characters"):
        trace_text(run, "")
    with pytest.raises(ValueError, match="character 1 is NUL"):
        trace_text(run, "a\0")
    for moe in ({"experts": 0}, {"slots": 2}):
        dense = run._replace(config=tiny.tiny(moe=moe))
        with pytest.raises(ValueError, match="no layer of this model routes tokens to experts"):
            next(traces(dense, []))


def test_layers_are_numbered_as_the_model_stacks_them(run) -> None:
    config = tiny.tiny(model={"layers": 5}, moe={"first_dense": 1, "every": 2})
    assert trace_meta(config, run.dataset).layers == (2, 4)
