"""Evaluation: bits per byte by domain, weighted by bytes, and it changes nothing."""

import dataclasses
import math
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.data import UNSCORED, open_dataset
from moejax.model import Transformer
from moejax.training.evaluate import evaluate
from moejax.training.program import Program
from moejax.training.state import make_graph
from moejax.training.step import EvalSums, eval_step, loss_fn
from tests import tiny


@pytest.fixture(scope="module")
def state(program):
    bias_LE = np.random.default_rng(0).normal(0, 0.1, (2, 4)).astype(np.float32)
    state = program.init(0)
    return state._replace(router_state=jax.device_put(bias_LE, state.router_state.sharding))


@pytest.fixture(scope="module")
def record(config, program, state):
    return evaluate(config, program, state, tiny.dataset())


def test_bits_per_byte_by_hand_from_the_logits(config, state, record):
    """Log-probabilities of the valid targets, over the bytes that the targets stand for."""
    params = jax.tree.map(jnp.asarray, jax.device_get(state.params))
    model = nnx.merge(make_graph(config, tiny.VOCABULARY), params)
    dataset = tiny.dataset()
    call = jax.jit(
        lambda b: model(
            b.tokens_BS,
            segment_BS=b.segment_BS,
            position_BS=b.position_BS,
            valid_BS=b.valid_BS,
            router_state=jnp.asarray(jax.device_get(state.router_state)),
        )[0]
    )
    nats, size, tokens = defaultdict(float), defaultdict(float), 0
    for batch in dataset.validation_batches(batch=8, limit_rows=16):
        logits_BSV = np.asarray(call(jax.tree.map(jnp.asarray, batch)), np.float64)
        for row, domain in enumerate(batch.domain_B):
            for s in np.flatnonzero(batch.valid_BS[row]):
                logits_V, target = logits_BSV[row, s], batch.targets_BS[row, s]
                nats[domain] += np.log(np.exp(logits_V).sum()) - logits_V[target]
                size[domain] += 1 if target else 0  # a byte; a separator stands for none
                tokens += 1
    assert len(nats) == 2
    by_domain = {dataset.domains[d]: nats[d] / size[d] / math.log(2) for d in nats}
    assert record["bpb_domain"] == pytest.approx(by_domain, rel=1e-4)
    whole = sum(nats.values()) / sum(size.values()) / math.log(2)
    assert record["bpb"] == pytest.approx(whole, rel=1e-4)
    assert record["tokens"] == tokens


def test_where_tokens_are_masked_only_they_count():
    """Training loss and evaluation, by hand from the logits; a model that had not hidden them would
    read them off its input."""
    config = tiny.tiny(moe={"experts": 0}, data={"mask_rate": 0.25})
    dataset = open_dataset(config.data, progress=False)
    batch = dataset.train_batch(0, seed=0)
    graph = make_graph(config, tiny.VOCABULARY)
    params = nnx.state(Transformer(config, tiny.VOCABULARY, nnx.Rngs(0)))

    bytes_V = jnp.asarray(dataset.bytes_V)

    @jax.jit
    def run(params, batch):
        logits_BSV, _ = nnx.merge(graph, params)(
            batch.tokens_BS, segment_BS=batch.segment_BS, position_BS=batch.position_BS
        )
        loss, _ = loss_fn(params, None, batch, jax.random.key(0), graph, config)
        sums = eval_step(params, None, batch, bytes_V, graph=graph, domains=2)
        return jax.nn.log_softmax(logits_BSV), loss, sums

    log_BSV, loss, sums = run(nnx.to_pure_dict(params), jax.tree.map(jnp.asarray, batch))
    masked = np.argwhere(batch.targets_BS != UNSCORED)
    nats = [-log_BSV[row, s, batch.targets_BS[row, s]] for row, s in masked]
    assert loss == pytest.approx(np.mean(nats), rel=1e-5)
    assert float(sums.nll_domain.sum()) == pytest.approx(np.sum(nats), rel=1e-5)
    assert float(sums.bytes_domain.sum()) == sums.targets == len(masked)
    assert sums.tokens == batch.valid_BS.sum() > 3 * len(masked)


def test_routing_is_over_the_whole_set(record, config):
    load_LE = np.asarray(record["load_LE"])
    np.testing.assert_allclose(load_LE.sum(-1), 1.0, rtol=1e-5)
    assert record["max_vio_global"] == pytest.approx((4 * load_LE.max(-1) - 1).mean(), rel=1e-4)
    assert 0 < record["max_vio_floor"] < 0.5
    assert record["drop"] == record["left_behind"] == 0.0
    assert "bpb_as_trained" not in record  # the same groups in training


def test_evaluation_changes_nothing_and_is_repeatable(config, program, state, record):
    before = tiny.copied(state)
    again = evaluate(config, program, state, tiny.dataset())
    tiny.assert_identical(jax.device_get(state), before)
    assert again["bpb"] == record["bpb"]


def test_padded_rows_and_more_batches_do_not_count_twice(config, program, state):
    """12 rows fill one batch and a half: the rest is padding of domain -1."""
    found = {}
    for rows in (8, 12):
        some = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_rows=rows))
        found[rows] = evaluate(some, program, state, tiny.dataset())["tokens"]
        batches = tiny.dataset().validation_batches(batch=8, limit_rows=rows)
        assert found[rows] == sum(int(batch.valid_BS.sum()) for batch in batches)
    assert found[8] < found[12]


def test_the_mean_is_weighted_by_bytes_not_by_domain_or_batch(config, program):
    """Two batches: 30 + 10 nats on 10 + 20 bytes of one domain, 7 on 1 byte of the other."""
    sums = iter(
        [
            EvalSums(np.array([30.0, 7.0]), np.array([10.0, 1.0]), *counts(11), None),
            EvalSums(np.array([10.0, 0.0]), np.array([20.0, 0.0]), *counts(20), None),
        ]
    )
    stub = Program(**{**vars(program), "eval_step": lambda *_: next(sums)})
    record = evaluate(config, stub, program.init(0), tiny.dataset())
    code, prose = tiny.dataset().domains
    bits = 1 / math.log(2)
    assert record["bpb_domain"] == pytest.approx({code: 40 / 30 * bits, prose: 7 * bits})
    assert record["bpb"] == pytest.approx(47 / 31 * bits)


def test_groups_of_training_are_reported_beside_those_of_evaluation(program):
    """Expert choice trained on pools and evaluated causally: the difference is the leak."""
    config = tiny.tiny(
        router={"name": "expert_choice", "k": 2},
        moe={"capacity_factor": 1.0, "eval_groups": "position"},
    )
    stub = _stub(program, pooled=20.0, causal=30.0)
    record = evaluate(config, stub, program.init(0), tiny.dataset())
    assert record["bpb_as_trained"] == pytest.approx(2 / 3 * record["bpb"])


def counts(tokens):
    """Of tokens, and of targets."""
    return np.int32(tokens), np.int32(tokens)


def _stub(program, pooled, causal):
    def sums(nats):
        one = EvalSums(np.array([nats, 0.0]), np.array([10.0, 1.0]), *counts(11), None)
        return lambda *_: one

    changes = {"eval_step": sums(causal), "eval_as_trained": sums(pooled)}
    return Program(**{**vars(program), **changes})
