"""Bits per byte equal a computation by hand from the logits of the same rows, domain by domain."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moejax.training.evaluate import evaluate
from moejax.training.state import make_graph
from tests import tiny

ROWS = 13  # of batches of 8: the last three rows are padding


@pytest.fixture(scope="module")
def record(config, program, finished):
    state = restored(finished, config, program)
    rows = dataclasses.replace(config.train, eval_rows=ROWS)
    return evaluate(dataclasses.replace(config, train=rows), program, state, tiny.dataset())


def restored(finished, config, program):
    state = tiny.saved_state(finished[0], config)
    return jax.tree.map(
        lambda a, like: jax.device_put(a, like.sharding), state, program.abstract_state
    )


def by_hand(state, config, logits_of):
    """Nats, bytes and tokens of each domain, in float64, token by token."""
    totals = {name: np.zeros(3) for name in tiny.dataset().domains}
    for batch in tiny.dataset().validation_batches(batch=8, limit_rows=ROWS):
        logits_BSV = np.asarray(logits_of(state, batch), np.float64)
        for row, domain in enumerate(batch.domain_B):
            for s in np.flatnonzero(batch.valid_BS[row]):
                target = batch.targets_BS[row, s]
                nats = np.log(np.exp(logits_BSV[row, s]).sum()) - logits_BSV[row, s, target]
                size = 0 if target == 0 else 1  # a separator is no text
                totals[tiny.dataset().domains[domain]] += (nats, size, 1)
    return totals


def test_bits_per_byte_by_hand(record, config, program, finished):
    graph = make_graph(config, tiny.VOCABULARY)

    @jax.jit
    def logits(params, router_state, batch):
        return nnx.merge(graph, params)(
            batch.tokens_BS,
            segment_BS=batch.segment_BS,
            position_BS=batch.position_BS,
            valid_BS=batch.valid_BS,
            router_state=router_state,
        )[0]

    state = tiny.saved_state(finished[0], config)
    state = jax.tree.map(jax.numpy.asarray, state)
    totals = by_hand(state, config, lambda s, batch: logits(s.params, s.router_state, batch))
    assert set(record["bpb_domain"]) == set(totals) == {"code", "prose"}
    for name, (nats, size, _) in totals.items():
        assert record["bpb_domain"][name] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    nats, size, tokens = sum(totals.values())  # weighted by bytes, not a mean of domains
    assert record["bpb"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    assert record["tokens"] == tokens


def test_uniform_logits_cost_ln_v_a_token(config, program, finished):
    state = restored(finished, config, program)
    params = {**state.params, "unembed_DV": state.params["unembed_DV"] * 0}
    rows = dataclasses.replace(config.train, eval_rows=ROWS)
    config = dataclasses.replace(config, train=rows)
    record = evaluate(config, program, state._replace(params=params), tiny.dataset())
    size = sum(
        int(tiny.dataset().bytes_V[batch.targets_BS[batch.valid_BS]].sum())
        for batch in tiny.dataset().validation_batches(batch=8, limit_rows=ROWS)
    )
    assert record["bpb"] == pytest.approx(8 * record["tokens"] / size, rel=1e-5)


def test_the_routing_figures_are_of_the_whole_set(record, config):
    load_LE = np.asarray(record["load_LE"])
    np.testing.assert_allclose(load_LE.sum(-1), 1.0, rtol=1e-5)
    violation = (load_LE.max(-1) * config.moe.experts - 1).mean()
    assert record["max_vio_global"] == pytest.approx(violation, rel=1e-4)
    assert 0 < record["max_vio_floor"] < 1
    assert record["drop"] == record["left_behind"] == 0  # capacity None


def test_the_run_itself_reports_the_same(config, program, finished):
    state = restored(finished, config, program)
    record = evaluate(config, program, state, tiny.dataset())
    assert record["bpb"] == finished[1]["bpb"]


def test_evaluation_leaves_no_trace_in_training(config, finished, tmp_path):
    """The same run evaluated after every step: same weights, same router state."""
    from moejax.training.loop import train

    often = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=1))
    train(often, tmp_path / "often", quiet=True)
    ours, theirs = (tiny.saved_state(w, config) for w in (tmp_path / "often", finished[0]))
    tiny.assert_identical(ours, theirs)
    rate, steps = tiny.LOSS_FREE["bias_rate"], config.train.steps
    assert 0 < np.abs(ours.router_state).max() <= rate * steps * 1.0001


def test_a_seed_changes_the_run_and_not_the_program(config, program, finished, tmp_path):
    from moejax.training.loop import train

    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    train(other, tmp_path / "other", quiet=True)
    ours, theirs = (tiny.saved_state(w, config) for w in (tmp_path / "other", finished[0]))
    assert not np.array_equal(ours.params["embed_VD"], theirs.params["embed_VD"])
