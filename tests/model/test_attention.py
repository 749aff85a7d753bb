"""Attention: latent, normed and in blocks, against plain computations; gradients; meshes."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig, ModelConfig
from moejax.model.attend import attend, attention_mask
from moejax.model.latent import LatentAttention
from moejax.model.layers import Attention, rope
from moejax.model.size import model_size
from moejax.sharding import make_mesh, param_shardings
from tests.model.tiny import LENGTH, ROWS, VOCAB, build, close, tiny_config, tokens

LATENT = {"attention": "latent", "head_dim": 4, "q_rank": 6, "kv_rank": 5, "rope_dim": 2}
POSITION_BS = jnp.broadcast_to(jnp.arange(LENGTH)[None], (ROWS, LENGTH))
SEGMENT_BS = jnp.asarray([[0] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
MASK = attention_mask(SEGMENT_BS)


def model(**changes: Any) -> ModelConfig:
    return ModelConfig(dim=8, heads=2, rope_theta=100.0, **{**LATENT, **changes})


def layer(config: ModelConfig) -> Any:
    """The layer, its scales and weights such that none is the same as another's."""
    kind = LatentAttention if config.attention == "latent" else Attention
    graph, params = nnx.split(kind(config, nnx.Rngs(params=0)))
    random = np.random.default_rng(0)
    return graph, jax.tree.map(lambda a: jnp.asarray(a + 0.2 * random.normal(size=a.shape)), params)


def inputs(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(ROWS, LENGTH, 8)), jnp.float32)


def attention(graph: Any, params: Any, x_BSD: jax.Array, position_BS: Any = POSITION_BS) -> Any:
    """The layer over tokens that see each other and nothing before them."""
    layer = nnx.merge(graph, params)
    return layer(x_BSD, layer.keep(x_BSD, position_BS), MASK, position_BS)


def rms(x, scale):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale[None, None]


def turn(x_BSR, theta):
    return rope(x_BSR[:, :, None], POSITION_BS, theta)[:, :, 0]


def one_head(q_BSX, k_BSX, v_BSX):
    """Softmax of masked scores, token by token in numpy's way."""
    scores_BSS = q_BSX @ jnp.swapaxes(k_BSX, 1, 2) / q_BSX.shape[-1] ** 0.5
    exp_BSS = jnp.where(MASK.seen_BSM, jnp.exp(scores_BSS), 0.0)
    return exp_BSS / exp_BSS.sum(-1, keepdims=True) @ v_BSX


def plain_latent(p: dict[str, Any], x_BSD, config: ModelConfig):
    """One head after the other, matrices as the paper has them."""
    q = x_BSD
    if config.q_rank:
        q = rms(x_BSD @ p["w_query_DQ"], p["query_norm"]["scale_D"])
    c = rms(x_BSD @ p["w_latent_DU"], p["latent_norm"]["scale_D"])
    k_R = turn(x_BSD @ p["w_position_DR"], config.rope_theta)
    y_BSD = 0.0
    for head in range(config.heads):
        q_C = q @ p["w_query_QHC"][:, head]
        q_R = turn(q_C[..., 4:], config.rope_theta)
        q_C = jnp.concatenate([q_C[..., :4], q_R], -1)
        k_C = jnp.concatenate([c @ p["w_key_UHA"][:, head], k_R], -1)
        y_BSD += one_head(q_C, k_C, c @ p["w_value_UHA"][:, head]) @ p["w_out_HAD"][head]
    return y_BSD


@pytest.mark.parametrize("q_rank", [6, 0])
def test_latent_attention_is_the_plain_computation(q_rank: int) -> None:
    config = model(q_rank=q_rank)
    graph, params = layer(config)
    pure, x_BSD = nnx.to_pure_dict(params), inputs()

    def ours(pure, x):
        return attention(graph, pure, x)

    def loss(forward):
        return lambda pure, x: jnp.sin(forward(pure, x)).sum()

    def theirs(pure, x):
        return plain_latent(pure, x, config)

    close(ours(pure, x_BSD), theirs(pure, x_BSD))
    got, want = (jax.jit(jax.grad(loss(f), (0, 1)))(pure, x_BSD) for f in (ours, theirs))
    assert len(jax.tree.leaves(want)) == (10 if q_rank else 8)  # with x
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(want))
    close(got, want, 1e-4)


def test_only_the_rotary_part_knows_positions() -> None:
    graph, params = layer(model())
    pure = nnx.to_pure_dict(params)

    @jax.jit
    def run(pure, position_BS):
        return attention(graph, pure, inputs(), position_BS)

    mixed_BS = POSITION_BS * 3 % LENGTH
    close(run(pure, POSITION_BS), run(pure, POSITION_BS + 5), 1e-4)  # relative
    assert np.abs(run(pure, POSITION_BS) - run(pure, mixed_BS)).max() > 1e-2
    without = {**pure, "w_position_DR": jnp.zeros_like(pure["w_position_DR"])}
    close(run(without, POSITION_BS), run(without, mixed_BS))
    no_queries = {**pure, "w_query_QHC": pure["w_query_QHC"].at[..., 4:].set(0.0)}
    close(run(no_queries, POSITION_BS), run(no_queries, mixed_BS))


def test_latent_attention_on_a_mesh_is_that_of_one_device() -> None:
    latent = {f"model__{key}": value for key, value in {**LATENT, "kv_rank": 4}.items()}
    config = tiny_config(moe__experts=0, model__layers=1, **latent)
    graph, params = build(config)
    pure = nnx.to_pure_dict(params)

    def gradient(pure, token_BS):
        def loss(pure):
            return jnp.sin(nnx.merge(graph, pure)(token_BS)[0]).sum()

        return jax.grad(loss)(pure)

    want = jax.jit(gradient)(pure, tokens())
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    where = param_shardings(pure, mesh)
    attention = where["stacks"][0]["blocks"][0]["attention"]
    assert attention["w_query_QHC"].spec == P(None, "fsdp", "tensor", None)
    assert attention["latent_norm"]["scale_D"].is_fully_replicated
    with jax.set_mesh(mesh):
        got = jax.jit(gradient)(jax.device_put(pure, where), tokens())
    close(got, want, 1e-4)


def test_queries_and_keys_are_normed_over_all_heads() -> None:
    config = ModelConfig(dim=8, heads=2, kv_heads=1, rope_theta=100.0, qk_norm=True)
    graph, params = layer(config)
    p, x = nnx.to_pure_dict(params), inputs()
    q_BSX = rms(x @ p["w_query_DHA"].reshape(8, -1), p["query_norm"]["scale_D"])
    k_BSX = rms(x @ p["w_key_DGA"].reshape(8, -1), p["key_norm"]["scale_D"])
    assert q_BSX.shape[-1] == 8 and k_BSX.shape[-1] == 4
    v_BSX, k_BSX = x @ p["w_value_DGA"][:, 0], turn(k_BSX, 100.0)
    heads = (
        one_head(turn(q_BSX[..., 4 * h :][..., :4], 100.0), k_BSX, v_BSX) @ p["w_out_HAD"][h]
        for h in range(2)
    )
    close(attention(graph, params, x), sum(heads))


@pytest.mark.parametrize(("kv_heads", "value_width"), [(2, 4), (1, 4), (2, 6)])
def test_parts_and_blocks_of_queries_change_work_and_memory_only(
    kv_heads: int, value_width: int
) -> None:
    random = np.random.default_rng(0)
    shapes = (2, 4), (kv_heads, 4), (kv_heads, value_width)
    arrays = [jnp.asarray(random.normal(size=(ROWS, LENGTH, *s)), jnp.float32) for s in shapes]

    def gradients(mask, block=0):
        def loss(*arrays):
            y_BSHA = attend(*arrays, mask, block)
            return jnp.sin(y_BSHA).sum(), y_BSHA

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))

    def scores(mask, block=0):
        """[queries, tokens] of the scores that are there at once: forward, and backward, where
        queries come last."""
        forward = partial(attend, mask=mask, block=block)
        y_BSHA, backward = jax.vjp(forward, *arrays)
        kinds = rf"{2 // kv_heads},(\d+),(\d+)", rf"(\d+),{2 // kv_heads},(\d+)"
        texts = str(jax.make_jaxpr(forward)(*arrays)), str(jax.make_jaxpr(backward)(y_BSHA))
        there, back = (
            {(int(a), int(b)) for a, b in re.findall(rf"f32\[2,{kv_heads},{kind}\] = dot_g", text)}
            for kind, text in zip(kinds, texts, strict=True)
        )
        return there, {(s, m) for m, s in back}

    whole = MASK._replace(in_order=False)
    right = gradients(whole)(*arrays)
    assert MASK.in_order and all(max(found) == (LENGTH, LENGTH) for found in scores(whole))
    for mask, block in ((MASK, 0), (MASK, 1), (whole, 2)):
        close(gradients(mask, block)(*arrays), right)
    for there in scores(MASK):
        assert {(2, 2), (2, 4), (2, 6), (2, 8)} <= there and (LENGTH, LENGTH) not in there
    for mask, block in ((MASK, 1), (whole, 2)):
        assert max(scores(mask, block)[0]) == (block, 8)
        assert (block, 8) in scores(mask, block)[1] and (8, 8) not in scores(mask, block)[1]


def test_bfloat16_is_as_close_as_its_numbers_are() -> None:
    """Values and gradients of the written-out gradient, against float32's."""
    random = np.random.default_rng(0)
    exact = [jnp.asarray(random.normal(size=(ROWS, LENGTH, 2, 4)), jnp.float32) for _ in range(3)]
    arrays = [a.astype(jnp.bfloat16) for a in exact]

    def both(*arrays):
        def loss(*arrays):
            y_BSHA = attend(*arrays, MASK).astype(jnp.float32)
            return jnp.sin(y_BSHA).sum(), y_BSHA

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)

    got, want = both(*arrays), both(*(a.astype(jnp.float32) for a in arrays))
    assert all(a.dtype == jnp.bfloat16 for a in got[1])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.01 * jnp.linalg.norm(b)


@pytest.mark.parametrize("block", [0, 2])
def test_gradients_of_attention_keep_no_scores(block: int) -> None:
    """What the backward pass is given grows with the tokens, not with their square."""
    length = 64
    arrays = [jnp.ones((1, length, 2, 4)) for _ in range(3)]
    mask = attention_mask(jnp.zeros((1, length), jnp.int32))
    _, backward = jax.vjp(lambda *a: attend(*a, mask, block), *arrays)
    floats = [a for a in jax.tree.leaves(backward) if a.dtype == jnp.float32]
    assert floats and max(a.size for a in floats) == length * 2 * 4


def test_size_of_latent_attention() -> None:
    config = tiny_config(moe__experts=0, **{f"model__{k}": v for k, v in LATENT.items()})
    size = model_size(config, VOCAB)
    attention = 8 * 6 + 6 * 2 * 6 + 8 * 5 + 5 * 2 * (4 + 4) + 8 * 2 + 2 * 4 * 8
    layer, norms = attention + 3 * 8 * 12, 6 + 5 + 2 * 8
    assert size.total == 2 * (layer + norms) + 2 * VOCAB * 8 + 8
    # 2 S H (A + R) for the scores, 2 S H A for the values; forward and twice backward.
    scores = 2 * LENGTH * 2 * (6 + 4)
    assert size.flops == 6 * (2 * layer + VOCAB * 8) + 3 * 2 * scores


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "latnt"}, r"unknown model\.attention 'latnt'; did you mean 'latent'"),
        ({"kv_rank": 0}, r"needs model\.kv_rank=0 >= 1"),
        ({"rope_dim": 3}, r"even model\.rope_dim >= 2, got 3"),
        ({"q_rank": -1}, r"model\.q_rank=-1 must not be negative"),
        ({"kv_heads": 1}, r"model\.kv_heads=1 is for model\.attention='grouped'.*all 2 heads"),
        ({"qk_norm": True}, r"model\.qk_norm=True is for model\.attention='grouped'"),
        ({"attention": "grouped"}, r"model\.q_rank=6 is for model\.attention='latent'"),
        ({"query_block": -1}, r"model\.query_block=-1 must not be negative"),
    ],
)
def test_bad_attention_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_blocks_must_divide_the_sequence() -> None:
    with pytest.raises(ValueError, match=r"data\.sequence=8 is not divisible by .*query_block=3"):
        tiny_config(model__query_block=3)
