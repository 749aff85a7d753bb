"""Which routers let a token see the future: found by changing it, and said by `Config.leaks`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import Config
from tests.model.tiny import LENGTH, ROWS, VOCAB, build, graph_of, tiny_config, tokens

CHANGES = 24
FUTURE = 4  # positions from here on are changed

# The same as `moejax.dependence` finds in a layer, here of the whole model's logits.
CASES = [
    # router, options, groups, capacity factor, leaks
    ("topk", {"k": 2}, "batch", None, False),
    ("topk", {"k": 2}, "batch", 0.5, True),
    ("topk", {"k": 2, "order": "token_major"}, "batch", 0.5, False),
    ("gshard_top2", {}, "sequence", 0.5, True),
    ("expert_choice", {"k": 2}, "batch", None, True),
    ("expert_choice", {"k": 2}, "position", None, False),
]


def futures_changed(config: Config) -> float:
    """Largest change of a logit before FUTURE when the same sequence changes from there on."""
    # Weights do not depend on the router: those of one config serve all of them.
    graph, (_, params) = graph_of(config), build(tiny_config())
    start_BS = tokens(0)
    other_XBS = tokens(1, (CHANGES, ROWS, LENGTH))
    # Half of the changes are made to the first sequence, half to the last.
    row_X = np.arange(CHANGES) % ROWS
    mine_XB = row_X[:, None] == np.arange(ROWS)
    changed_XBS = mine_XB[:, :, None] & (np.arange(LENGTH) >= FUTURE)
    variants = jnp.where(changed_XBS, other_XBS, start_BS)

    @jax.jit
    def logits(params, token_XBS):
        return jax.lax.map(lambda token_BS: nnx.merge(graph, params)(token_BS)[0], token_XBS)

    before = logits(params, jnp.tile(start_BS, (CHANGES, 1, 1)))[:, :, :FUTURE]
    after = logits(params, variants)[:, :, :FUTURE]
    return float(np.abs(np.asarray(after - before)[mine_XB]).max())


@pytest.mark.parametrize(("router", "options", "groups", "factor", "leaks"), CASES)
def test_changing_the_future(router, options, groups, factor, leaks: bool) -> None:
    config = tiny_config(router, options, moe__groups=groups, moe__capacity_factor=factor)
    assert config.leaks is leaks
    change = futures_changed(config)
    assert (change > 1e-4) if leaks else (change < 1e-6), change


@pytest.mark.parametrize("router", ["topk", "expert_choice"])
def test_gradient_reaches_no_later_token(router: str) -> None:
    # Every position holds its own id, so a row of the embedding's gradient is one position's.
    config = tiny_config(router, moe__groups="position")
    graph, params = build(config)
    token_BS = jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)

    @jax.jit
    def by_embedding(params, at):
        def loss(params):
            return jnp.sin(nnx.merge(graph, params)(token_BS)[0][0, at]).sum()

        return jax.grad(loss)(params)["embed_VD"][...]

    for at in (0, 3, LENGTH - 1):
        reached_V = np.abs(by_embedding(params, at)).max(-1) > 0
        want_V = np.arange(VOCAB) <= at
        if router == "expert_choice":  # the tokens of one position compete, but weigh by themselves
            assert not np.any(reached_V & ~want_V)
        else:
            np.testing.assert_array_equal(reached_V, want_V)


def test_where_tokens_are_masked_all_of_a_document_is_seen_and_nothing_leaks() -> None:
    pooled = tiny_config("expert_choice", data__mask_rate=0.2)
    assert pooled.dependence is not None and pooled.dependence.later and not pooled.leaks
    graph, params = build(tiny_config(moe__experts=0, data__mask_rate=0.2))
    token_BS = jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    segment_BS = jnp.tile(jnp.asarray([0, 0, 0, 0, 0, 1, 1, 1]), (ROWS, 1))

    @jax.jit
    def by_embedding(params):
        def loss(params):
            logits_BSV, _ = nnx.merge(graph, params)(token_BS, segment_BS=segment_BS)
            return jnp.sin(logits_BSV[0, 2]).sum()

        return jax.grad(loss)(params)["embed_VD"][...]

    reached_V = np.abs(by_embedding(params)).max(-1) > 0
    np.testing.assert_array_equal(reached_V, np.arange(VOCAB) < 5)


def test_a_dense_model_never_leaks() -> None:
    assert not tiny_config("expert_choice", moe__experts=0).leaks
