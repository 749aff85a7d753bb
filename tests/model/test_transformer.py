"""The transformer: the scan is the plain loop, layouts are as configured, documents are alone."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import Config
from moejax.model import Transformer
from moejax.model.attend import attention_mask
from moejax.model.layers import RMSNorm, embedded, rope
from tests.model.tiny import LENGTH, ROWS, VOCAB, build, close, graph_of, named, tiny_config, tokens


def looped(config: Config, params: Any, token_BS: jax.Array, key: Any, state_LE: Any) -> Any:
    """The same model with a Python loop over layers instead of the scan."""
    model = nnx.merge(graph_of(config), params)
    context = model._context(token_BS, None, None, None)
    x_BSD = model.embed_VD[...][token_BS]
    keys = (
        [None] * config.moe_layers
        if key is None
        else list(model._layer_keys(jax.random.split(key, token_BS.shape[0])))
    )
    stats, moe = [], 0
    for unit in model.stacks:
        graph, stacked = nnx.split(unit)
        repeats = jax.tree.leaves(stacked)[0].shape[0]
        for index in range(repeats):
            one = nnx.merge(graph, jax.tree.map(lambda a, i=index: a[i], stacked))
            for block in one.blocks:
                routed = hasattr(block.feed_forward, "router")
                at = (keys[moe], state_LE[moe]) if routed else (None, None)
                x_BSD, block_stats, _ = block(x_BSD, context, *at)
                if routed:
                    stats.append(block_stats)
                    moe += 1
    logits_BSV = model.final_norm(x_BSD) @ model.unembed_DV[...]
    return logits_BSV, jax.tree.map(lambda *a: jnp.stack(a), *stats)


def test_scanned_layers_are_the_plain_loop() -> None:
    config = tiny_config(
        "loss_free",
        model__layers=5,
        moe__first_dense=1,
        moe__every=2,
        moe__shared=1,
        moe__jitter=0.1,
    )
    graph, params = build(config)
    token_BS, key = tokens(), jax.random.key(1)
    state_LE = jnp.asarray([[0.2, 0.0, -0.2, 0.1], [-0.3, 0.1, 0.2, 0.0]])

    def scanned(config, params, token_BS, key, state_LE):
        return nnx.merge(graph, params)(token_BS, key=key, router_state=state_LE)

    def loss(forward, params):
        logits_BSV, stats = forward(config, params, token_BS, key, state_LE)
        return jnp.sin(logits_BSV).sum() + stats.z.sum(), (logits_BSV, stats)

    run = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    got, want = run(scanned, params), run(looped, params)
    close(got, want)
    assert min(float(np.abs(a).max()) for a in jax.tree.leaves(got[0])) > 0  # no weight left out


def test_rematerialised_is_the_same() -> None:
    token_BS, key = tokens(), jax.random.key(0)
    results: list[Any] = []
    sorts, bytes_of = {}, {}
    for remat in ("none", "full", "routing"):
        graph, params = build(
            tiny_config("gshard_top2", model__remat=remat, moe__capacity_factor=1.0)
        )

        def loss(params, graph=graph):
            logits_BSV, stats = nnx.merge(graph, params)(token_BS, key=key)
            return jnp.sin(logits_BSV).sum(), stats

        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(params).compile()
        results.append(compiled(params))
        sorts[remat] = len(re.findall(r" sort\(", compiled.as_text()))
        bytes_of[remat] = compiled.memory_analysis().temp_size_in_bytes
    for again in results[1:]:
        close(again, results[0])
    assert results[0][1].dropped_K.sum() > 0  # gshard's coins fell alike, too
    assert sorts["none"] == sorts["routing"] < sorts["full"]  # kept: nothing is chosen twice
    assert max(bytes_of["full"], bytes_of["routing"]) < 0.8 * bytes_of["none"]


ATTENTION = 8 * 2 * 4 * 4  # query, key, value, out: D H A each
NORMS = 2 * 8
DENSE = 3 * 8 * 12
ENDS = 2 * VOCAB * 8 + 8  # embedding, unembedding, final norm


@pytest.mark.parametrize(
    ("changes", "kinds", "count"),
    [
        ({"moe__experts": 0}, "dd", 2 * (ATTENTION + NORMS + DENSE) + ENDS),
        # A router of 8 x 4, and four experts of the dense layer's width.
        ({}, "mm", 2 * (ATTENTION + NORMS + 32 + 4 * DENSE) + ENDS),
        (
            # One dense layer, then (dense, experts) twice; experts of width 6, one shared.
            {
                "model__layers": 5,
                "moe__first_dense": 1,
                "moe__every": 2,
                "moe__ffn": 6,
                "moe__shared": 1,
            },
            "ddmdm",
            5 * (ATTENTION + NORMS) + 3 * DENSE + 2 * (32 + 5 * DENSE // 2) + ENDS,
        ),
        # kv_heads 1 of 2: keys and values are half as wide. gelu has no gate: two matrices.
        (
            {"model__kv_heads": 1, "model__activation": "gelu", "moe__shared": 2},
            "mm",
            2 * (ATTENTION * 3 // 4 + NORMS + 32 + 6 * DENSE * 2 // 3) + ENDS,
        ),
        # A head of its own width, 6: heads x width is not the model's.
        ({"model__head_dim": 6}, "mm", 2 * (ATTENTION * 3 // 2 + NORMS + 32 + 4 * DENSE) + ENDS),
    ],
)
def test_layouts_and_parameter_counts(changes: dict[str, Any], kinds: str, count: int) -> None:
    config = tiny_config(**changes)
    params = nnx.state(nnx.eval_shape(lambda: Transformer(config, VOCAB, nnx.Rngs(0))))
    leaves = named(params)
    assert sum(int(np.prod(a.shape)) for a in leaves.values()) == count
    assert {a.dtype for a in leaves.values()} == {np.dtype("float32")}
    layout = ""
    for stack in range(len({name.split(".")[1] for name in leaves if name.startswith("stacks")})):
        mine = {n: a for n, a in leaves.items() if n.startswith(f"stacks.{stack}.")}
        blocks = sorted({name.split(".")[3] for name in mine})
        routed = {name.split(".")[3] for name in mine if name.endswith("w_router_DE")}
        repeats = next(iter(mine.values())).shape[0]
        layout += "".join("m" if block in routed else "d" for block in blocks) * repeats
    assert layout == kinds
    assert config.moe_layers == kinds.count("m")


def test_grouped_queries_share_their_key_and_value_head() -> None:
    # One kv head is two equal ones.
    token_BS = tokens()
    graph_1, params_1 = build(tiny_config(model__kv_heads=1, moe__experts=0))
    graph_2, params_2 = build(tiny_config(moe__experts=0))
    pure = nnx.to_pure_dict(params_1)
    for attention in (pure["stacks"][0]["blocks"][0]["attention"],):
        for name in ("w_key_DGA", "w_value_DGA"):
            attention[name] = jnp.repeat(attention[name], 2, axis=2)  # L D G A
    nnx.replace_by_pure_dict(params_2, pure)
    one, _ = nnx.merge(graph_1, params_1)(token_BS)
    two, _ = nnx.merge(graph_2, params_2)(token_BS)
    close(one, two)


def test_rope_turns_by_relative_position() -> None:
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 6)), jnp.float32) for _ in range(2))

    def score(at_q: int, at_k: int) -> float:
        turned = [rope(a, jnp.asarray([[p]]), 100.0) for a, p in ((q, at_q), (k, at_k))]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-2)
    np.testing.assert_array_equal(rope(q, jnp.asarray([[0]]), 100.0), q)
    # Width 2: one pair, turned by the position itself: (1, 0) -> (cos 2, sin 2).
    pair = rope(jnp.asarray([[[[1.0, 0.0]]]]), jnp.asarray([[2]]), 100.0)
    np.testing.assert_allclose(pair[0, 0, 0], [np.cos(2), np.sin(2)], rtol=1e-5)


def test_rms_norm_by_hand() -> None:
    # rms(3, 4) = sqrt(12.5).
    norm = RMSNorm(2)
    np.testing.assert_allclose(
        norm(jnp.asarray([[[3.0, 4.0]]]))[0, 0], np.array([3, 4]) / 12.5**0.5, rtol=1e-6
    )


def test_attention_mask_by_hand() -> None:
    mask_SS = attention_mask(jnp.asarray([[0, 0, 1]])).seen_BSM[0]
    assert mask_SS.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_documents_do_not_see_each_other() -> None:
    # Two documents in a row: the second's logits are those it has in a row of its own.
    graph, params = build(tiny_config())
    model = nnx.merge(graph, params)
    token_BS = tokens(3)
    segment_BS = jnp.tile(jnp.asarray([0, 0, 0, 1, 1, 1, 1, 1]), (ROWS, 1))
    packed, _ = model(token_BS, segment_BS=segment_BS)
    alone, _ = model(token_BS[:, 3:])
    close(packed[:, 3:], alone)
    together, _ = model(token_BS)
    assert (
        np.abs(together[:, 3:] - alone).max() > 1e-3
    )  # without the numbers they do see each other


def test_padding_behind_the_text_changes_nothing() -> None:
    graph, params = build(tiny_config("topk", moe__capacity_factor=1.0))
    model = nnx.merge(graph, params)
    valid_BS = jnp.arange(LENGTH)[None] < jnp.asarray([[LENGTH], [5]])
    junk_BS = jnp.where(valid_BS, tokens(0), tokens(1))
    one, stats = model(tokens(0), valid_BS=valid_BS)
    two, other = model(junk_BS, valid_BS=valid_BS)
    close(jnp.where(valid_BS[..., None], one, 0.0), jnp.where(valid_BS[..., None], two, 0.0))
    close(stats, other)
    assert stats.tokens.tolist() == [13, 13] and stats.load_E.sum(-1).tolist() == [26, 26]


def test_state_and_noise_reach_their_own_layer() -> None:
    model = nnx.merge(*build(tiny_config("loss_free", {"k": 1})))
    state_LE = jnp.zeros((2, 4)).at[1, 3].set(5.0)  # only the second layer is told to use expert 3
    _, stats = model(tokens(), router_state=state_LE)
    assert stats.load_E[1].tolist() == [0, 0, 0, ROWS * LENGTH]
    assert stats.load_E[0, 3] < ROWS * LENGTH
    model = nnx.merge(*build(tiny_config("gshard_top2")))
    _, quiet = model(tokens())
    _, noisy = model(tokens(), key=jax.random.key(0))
    assert quiet.load_E.sum(-1).tolist() == [2 * ROWS * LENGTH] * 2
    assert np.all(noisy.load_E.sum(-1) < 2 * ROWS * LENGTH)
    assert quiet.load_E.shape == (2, 4)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32() -> None:
    graph, params = build(tiny_config(model__dtype="bfloat16"))
    assert {a.dtype for a in named(params).values()} == {np.dtype("float32")}
    low, stats = nnx.merge(graph, params)(tokens())
    high, _ = nnx.merge(graph_of(tiny_config()), params)(tokens())
    assert low.dtype == jnp.float32 and stats.prob_E.dtype == jnp.float32
    assert 1e-4 < np.abs(low - high).mean() < 0.05
    assert "bf16" in str(jax.make_jaxpr(lambda t: nnx.merge(graph, params)(t)[0])(tokens()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_a_frequent_token_are_summed_in_float32(dtype):
    """4,096 tokens want 1 each; a sum in bfloat16 would stop at 256. And nobody else wants any."""
    table_VD, token_BS = jnp.arange(12.0).reshape(4, 3), jnp.full((8, 512), 2)
    x_BSD, vjp = jax.vjp(lambda table: embedded(table, token_BS, jnp.dtype(dtype)), table_VD)
    assert x_BSD.dtype == dtype and np.array_equal(np.unique(x_BSD), [6.0, 7.0, 8.0])
    (grads_VD,) = vjp(jnp.ones_like(x_BSD))
    assert grads_VD.dtype == jnp.float32
    np.testing.assert_array_equal(grads_VD, jnp.zeros((4, 3)).at[2].set(4096.0))
