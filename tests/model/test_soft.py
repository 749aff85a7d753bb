"""Soft MoE against loops over slots and tokens, at phi = 0, with padding, and in the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import Config, MoeConfig
from moejax.dispatch import Experts
from moejax.model import MoE, SoftMoE
from moejax.model.size import model_size
from moejax.model.soft import SoftParams, l2norm, soft_moe
from moejax.routing.metrics import figures
from moejax.training.state import init_router_state
from tests.model.tiny import LENGTH, ROWS, VOCAB, build, close, tiny_config, tokens

BATCH, SEQUENCE, DIM, FFN, EXPERTS, SLOTS = 2, 5, 6, 7, 3, 2
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


PARAMS = SoftParams(
    normal(DIM, EXPERTS * SLOTS),
    jnp.asarray([1.7]),
    Experts(normal(EXPERTS, DIM, FFN), normal(EXPERTS, FFN, DIM)),
)
X_BSD = normal(BATCH, SEQUENCE, DIM)
ALL_BS = jnp.ones((BATCH, SEQUENCE), bool)
SOME_BS = jnp.asarray([[True, True, False, True, False], [True] * 5])

run = jax.jit(functools.partial(soft_moe, activation="relu"))


def expert(e: int, x_D: np.ndarray) -> np.ndarray:
    w_in_DF, w_out_FD = (np.asarray(w[e], np.float64) for w in PARAMS.experts[:2])
    return np.maximum(x_D @ w_in_DF, 0.0) @ w_out_FD


def by_loops(x_SD: np.ndarray) -> np.ndarray:
    """One sequence without padding, slot by slot."""
    phi_DZ = np.asarray(PARAMS.phi_DZ, np.float64)
    phi_DZ = 1.7 * phi_DZ / np.linalg.norm(phi_DZ, axis=0)
    logits_SZ = x_SD / np.linalg.norm(x_SD, axis=1)[:, None] @ phi_DZ
    into_SZ = np.exp(logits_SZ) / np.exp(logits_SZ).sum(0)
    out_SZ = np.exp(logits_SZ) / np.exp(logits_SZ).sum(1)[:, None]
    y_SD = np.zeros_like(x_SD)
    for z in range(EXPERTS * SLOTS):
        slot_D = sum(into_SZ[s, z] * x_SD[s] for s in range(len(x_SD)))
        y_SD += out_SZ[:, z : z + 1] * expert(z // SLOTS, slot_D)
    return y_SD


def test_equals_loops_over_slots() -> None:
    y_BSD, _ = run(PARAMS, X_BSD, valid_BS=ALL_BS)
    close(y_BSD, np.stack([by_loops(np.asarray(x_SD, np.float64)) for x_SD in X_BSD]))


def test_padding_is_mixed_into_nothing() -> None:
    y_BSD, stats = run(PARAMS, X_BSD, valid_BS=SOME_BS)
    real = np.asarray(SOME_BS[0])
    close(y_BSD[0][real], by_loops(np.asarray(X_BSD[0], np.float64)[real]))
    assert not np.any(np.asarray(y_BSD[0])[~real])
    junk_BSD = jnp.where(SOME_BS[..., None], X_BSD, 100.0 * normal(*X_BSD.shape))
    junk_y_BSD, junk_stats = run(PARAMS, junk_BSD, valid_BS=SOME_BS)
    close((junk_y_BSD, junk_stats), (y_BSD, stats))
    # A sequence of nothing but padding gives zeros, and no gradient that is not a number.
    none_BS = jnp.zeros_like(ALL_BS)

    def total(p):
        return run(p, X_BSD, valid_BS=none_BS)[0].sum()

    value, gradient = jax.value_and_grad(total)(PARAMS)
    assert value == 0 and not any(np.any(g) for g in jax.tree.leaves(gradient))
    assert run(PARAMS, X_BSD, valid_BS=none_BS)[1].load_E.tolist() == [0, 0, 0]


def test_phi_zero_gives_the_mean_of_the_experts_at_the_mean_token() -> None:
    p = PARAMS._replace(phi_DZ=jnp.zeros_like(PARAMS.phi_DZ))
    y_BSD, _ = run(p, X_BSD, valid_BS=ALL_BS)
    mean_BD = np.asarray(X_BSD, np.float64).mean(1)
    want_BD = np.stack([np.mean([expert(e, x_D) for e in range(EXPERTS)], 0) for x_D in mean_BD])
    close(y_BSD, np.broadcast_to(want_BD[:, None], y_BSD.shape))


def test_every_weight_of_every_expert_has_a_gradient() -> None:
    cut_BSD = normal(*X_BSD.shape)
    gradient = jax.grad(lambda p: (run(p, X_BSD, valid_BS=ALL_BS)[0] * cut_BSD).sum())(PARAMS)
    assert np.abs(gradient.phi_DZ).max(0).min() > 1e-4 and np.abs(gradient.scale_1).min() > 1e-4
    for w in gradient.experts[:2]:
        assert np.abs(w).max((1, 2)).min() > 1e-3


def test_l2norm_by_hand() -> None:
    # (3, 4) has norm 5; what is 0 stays 0; 1e-6 stands under the root: 1e-3 / sqrt(2e-6).
    got = l2norm(jnp.asarray([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]]), axis=1)
    np.testing.assert_allclose(got, [[0.6, 0.8], [0, 0], [0.5**0.5, 0]], rtol=1e-5)


def test_statistics() -> None:
    y_BSD, stats = run(PARAMS, X_BSD, valid_BS=SOME_BS)
    assert int(stats.tokens) == 8 and int(stats.sequences) == 2
    assert stats.load_E.tolist() == stats.kept_E.tolist() == [4, 4, 4]  # 2 slots x 2 sequences
    assert int(stats.first_E.sum()) == 8
    np.testing.assert_allclose(stats.prob_E.sum(), 8, rtol=1e-5)
    np.testing.assert_allclose(stats.weight_E, stats.prob_E, rtol=1e-5)
    np.testing.assert_allclose(stats.output_ED.sum(0), y_BSD.sum((0, 1)), rtol=1e-4, atol=1e-5)
    shown = figures(jax.tree.map(lambda a: a[None], stats))
    assert shown["max_vio"] == 0 and shown["drop"] == 0 and shown["left_behind"] == 0
    halves = [run(PARAMS, X_BSD[b : b + 1], valid_BS=SOME_BS[b : b + 1])[1] for b in (0, 1)]
    close(jax.tree.map(jnp.add, *halves), stats)


# In the model.


def soft_config(**changes) -> Config:
    return tiny_config(**{"moe__slots": 2, **changes})


def test_config_knows_what_it_is() -> None:
    config = soft_config()
    assert config.leaks and config.dependence.others is False
    assert config.choices == 2 * 4 / LENGTH
    assert init_router_state(tiny_config("loss_free", moe__slots=1), jnp.ones(VOCAB)) is None
    # Half of all slots' work falls on a token: 8 slots for 8 tokens, one expert of four.
    size, routed = model_size(config, VOCAB), 2 * 4 * 3 * 8 * 12
    assert size.total - size.active == routed * 3 // 4
    for message, changes in {
        "drops": {"moe__capacity_factor": 1.0},
        "slots=-1 must not be negative": {"moe__slots": -1},
        "needs moe.experts above 0": {"moe__experts": 0},
        "balance.router_z=0.1 must be 0": {"balance__router_z": 0.1},
        "moe.jitter=0.1 must be left out": {"moe__jitter": 0.1},
        "train.eval_without=True asks routers": {"train__eval_without": True},
    }.items():
        with pytest.raises(ValueError, match=message if message != "drops" else "no capacity"):
            soft_config(**changes)


def test_the_transformer_mixes_the_future_into_the_past() -> None:
    config = soft_config(moe__shared=1)
    graph, params = build(config)
    token_BS = tokens()

    @jax.jit
    def forward(token_BS):
        return nnx.merge(graph, params)(token_BS, key=jax.random.key(0))

    (logits_BSV, stats), (later_BSV, _) = (
        forward(t) for t in (token_BS, token_BS.at[0, 5:].set((token_BS[0, 5:] + 1) % VOCAB))
    )
    assert logits_BSV.shape == (ROWS, LENGTH, VOCAB)
    assert stats.load_E.tolist() == [[2 * ROWS] * 4] * 2
    assert np.abs(later_BSV[0, :5] - logits_BSV[0, :5]).max() > 1e-4
    np.testing.assert_array_equal(later_BSV[1], logits_BSV[1])  # the other sequence is alone


def test_one_layer_routes_and_the_other_does_not() -> None:
    model = tiny_config().model
    with pytest.raises(ValueError, match="MoE routes, moe.slots=1 is for SoftMoE"):
        MoE(model, MoeConfig(4, slots=1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="slots=0 must be at least 1"):
        SoftMoE(model, MoeConfig(4), rngs=nnx.Rngs(0))
    layer = SoftMoE(model, MoeConfig(4, slots=1), rngs=nnx.Rngs(0))
    x_BSD = normal(2, 3, model.dim).astype(jnp.bfloat16)
    y_BSD, _ = layer(x_BSD, token_BS=jnp.zeros((2, 3), jnp.int32), key=jax.random.key(0))
    assert y_BSD.dtype == jnp.bfloat16 and layer.phi_DZ[...].shape == (model.dim, 4)
