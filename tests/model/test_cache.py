"""The cache: logits of tokens read in pieces are those of one pass over all of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import MeshConfig
from moejax.routing import LayerSize
from moejax.sharding import make_mesh
from tests.model.tiny import LENGTH, ROWS, VOCAB, build, close, tiny_config, tokens

FIRST = 4  # tokens that are read at once, before the others follow one by one
LATENT = {"attention": "latent", "head_dim": 4, "q_rank": 6, "kv_rank": 5, "rope_dim": 2}
GROUPED = {"kv_heads": 1, "head_dim": 6, "qk_norm": True, "rope_theta": 100.0}


def named(section: str, **values: Any) -> dict[str, Any]:
    return {f"{section}__{key}": value for key, value in values.items()}


# Between them every kind of attention and layer, and routers with a state, with token ids, with
# further projections, of a batch in evaluation, and one that compares rows.
CASES: dict[str, Any] = {
    "dense": tiny_config(moe__experts=0, **named("model", **GROUPED)),
    "grouped": tiny_config(
        "loss_free",
        moe__first_dense=1,
        moe__every=2,
        moe__shared=1,
        **named("model", layers=5, **GROUPED),
    ),
    "latent": tiny_config("hash", moe__first_dense=1, **named("model", **LATENT)),
    "latent, no rank of queries": tiny_config(
        "noisy_topk", **named("model", **{**LATENT, "q_rank": 0})
    ),
    "assigned": tiny_config("base", **named("model", query_block=2)),
    "by position": tiny_config("expert_choice", moe__groups="position"),
}


def state_of(config: Any) -> Any:
    """Router states that are not the initial ones where those are zeros."""
    size = LayerSize(config.moe.experts, config.model.dim, VOCAB, jnp.ones(VOCAB))
    state = config.router.make().init(size) if config.moe.experts else None
    random = np.random.default_rng(0)

    def layers(a: jax.Array) -> jax.Array:
        moved = random.normal(size=(config.moe_layers, *a.shape)) if a.dtype == jnp.float32 else 0
        return jnp.broadcast_to(a, (config.moe_layers, *a.shape)) + jnp.asarray(moved, a.dtype)

    return jax.tree.map(layers, state)


def rows(padding_B: Any) -> dict[str, jax.Array]:
    """Arguments of rows with so many tokens of padding in front."""
    place_BS = jnp.arange(LENGTH)[None] - jnp.asarray(padding_B)[:, None]
    real_BS = place_BS >= 0
    return {
        "segment_BS": jnp.where(real_BS, 0, 1),
        "position_BS": jnp.maximum(place_BS, 0),
        "valid_BS": real_BS,
    }


def whole(graph: Any, params: Any, state: Any, token_BS: jax.Array, of: Any) -> jax.Array:
    return nnx.merge(graph, params)(token_BS, router_state=state, **of)[0]


def in_pieces(graph: Any, params: Any, state: Any, token_BS: jax.Array, of: Any) -> jax.Array:
    """The same logits: FIRST tokens at once, then one at a time."""
    model = nnx.merge(graph, params)

    def read(cache: Any, piece: Any) -> Any:
        logits_BSV, cache = model.extend(cache, piece[0], router_state=state, **piece[1])
        return cache, logits_BSV

    cache = model.empty_cache(token_BS.shape[0], LENGTH)
    cache, first_BSV = read(cache, jax.tree.map(lambda a: a[:, :FIRST], (token_BS, of)))
    rest = jax.tree.map(lambda a: jnp.swapaxes(a[:, FIRST:], 0, 1)[..., None], (token_BS, of))
    _, rest_SB1V = jax.lax.scan(read, cache, rest)
    return jnp.concatenate([first_BSV, jnp.swapaxes(rest_SB1V[:, :, 0], 0, 1)], axis=1)


both = jax.jit(lambda *args: (whole(*args), in_pieces(*args)), static_argnums=0)


@pytest.mark.parametrize("case", CASES)
def test_read_in_pieces_is_read_at_once(case: str) -> None:
    config = CASES[case]
    graph, params = build(config)
    of = rows([0, 2])
    want, got = both(graph, params, state_of(config), tokens(), of)
    real_BS1 = of["valid_BS"][..., None]
    close(jnp.where(real_BS1, got, 0), jnp.where(real_BS1, want, 0))
    assert np.abs(want).max() > 0.1


@pytest.mark.parametrize("attention", [GROUPED, LATENT], ids=["grouped", "latent"])
def test_in_bfloat16_up_to_its_rounding(attention: dict[str, Any]) -> None:
    config = tiny_config(**named("model", dtype="bfloat16", **attention))
    want, got = both(*build(config), None, tokens(), rows([0, 2]))
    # 8 bits of a number: steps of 2^-8 = 0.004, a few of them in a row.
    close(got, want, 0.02)


def test_a_row_does_not_depend_on_the_others() -> None:
    """Beside another row, and alone without the padding: the same."""
    config = CASES["grouped"]
    graph, params = build(config)
    state, token_BS, of = state_of(config), tokens(), rows([0, 2])
    got = both(graph, params, state, token_BS, of)[1]
    other = both(graph, params, state, token_BS.at[0].set(tokens(1)[0]), of)[1]
    np.testing.assert_allclose(other[1], got[1], rtol=0, atol=1e-6)
    assert np.abs(other[0] - got[0]).max() > 0.1
    alone = nnx.merge(graph, params)(token_BS[1:, 2:], router_state=state)[0]
    close(got[1:, 2:], alone)


def test_what_is_kept_of_latent_attention_is_the_latent() -> None:
    """U + R = 5 + 2 numbers of a token and layer; the heads' keys and values would be 2 (6 + 4)."""
    model = nnx.merge(*build(CASES["latent"]))
    cache = model.empty_cache(ROWS, LENGTH)
    assert [a.shape for a in jax.tree.leaves(cache.kept)] == [(1, ROWS, LENGTH, 1, 7)] * 2
    state = state_of(CASES["latent"])

    def has_keys_of_heads(size: int) -> bool:
        """Where `size` tokens are read: all tokens' keys or values of both heads."""
        of = jax.tree.map(lambda a: a[:, :size], rows([0, 0]))

        def read(cache):
            return model.extend(cache, tokens()[:, :size], router_state=state, **of)

        return f"f32[{ROWS},{LENGTH},2,4]" in str(jax.make_jaxpr(read)(cache))

    assert has_keys_of_heads(2) and not has_keys_of_heads(1)


def test_more_tokens_than_slots_are_refused() -> None:
    model = nnx.merge(*build(CASES["dense"]))
    with pytest.raises(ValueError, match="8 tokens do not fit a cache of 4 slots"):
        jax.eval_shape(lambda c: model.extend(c, tokens(), **rows([0, 0])), model.empty_cache(2, 4))


def test_on_a_mesh_rows_of_the_cache_are_cut() -> None:
    config = CASES["dense"]
    mesh = make_mesh(MeshConfig(data=2, tensor=1), jax.devices()[:2])
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda p: nnx.merge(build(config)[0], p).empty_cache(ROWS, LENGTH))(
            build(config)[1]
        )
    (shape,) = {a.sharding.shard_shape(a.shape) for a in jax.tree.leaves(cache.kept)}
    assert shape == (2, 1, LENGTH, 1, 6)
