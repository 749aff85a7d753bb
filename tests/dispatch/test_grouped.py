"""The grouped feed-forward network against its definition, in values and gradients."""

import re
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.dispatch import blocks, products
from moejax.dispatch.grouped import choose, grouped_ffn, tokens_ffn
from moejax.dispatch.rows import Rows
from moejax.dispatch.trial import Sizes


def one_by_one(rows_ND, w_in_EDF, w_gate_EDF, w_out_EFD, load_E, activation):
    """The definition: every expert on every row, of which each keeps its own expert's."""
    end_E, row_N = jnp.cumsum(load_E), jnp.arange(len(rows_ND))
    y_ND = jnp.zeros_like(rows_ND)
    for e in range(len(w_in_EDF)):
        h_NF = rows_ND @ w_in_EDF[e]
        h_NF = (
            activation(h_NF) if w_gate_EDF is None else activation(rows_ND @ w_gate_EDF[e]) * h_NF
        )
        own_N = (end_E[e] - load_E[e] <= row_N) & (row_N < end_E[e])
        y_ND += jnp.where(own_N[:, None], h_NF @ w_out_EFD[e], 0)
    return y_ND


def arrays(num_rows, width, hidden, num_experts, gated, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), dtype)

    w_gate_EDF = normal(num_experts, width, hidden) if gated else None
    w_in_EDF, w_out_EFD = normal(num_experts, width, hidden), normal(num_experts, hidden, width)
    return normal(num_rows, width), w_in_EDF, w_gate_EDF, w_out_EFD


@partial(jax.jit, static_argnums=(0, 3))
def value_and_grads(ffn, args, load_E, activation):
    """Output and the gradients of a fixed random projection of it, all in float32."""
    direction = jnp.asarray(np.random.default_rng(1).normal(size=args[0].shape), jnp.float32)

    def loss(*args):
        y_ND = ffn(*args, load_E, activation).astype(jnp.float32)
        return jnp.vdot(direction, y_ND), y_ND

    of = (0, 1, 2, 3) if args[2] is not None else (0, 1, 3)
    (_, y_ND), grads = jax.value_and_grad(loss, argnums=of, has_aux=True)(*args)
    return [y_ND, *(g.astype(jnp.float32) for g in grads)]


def assert_equal_to_definition(args, load, activation=jax.nn.silu, tolerance=2e-5, garbage=0.0):
    total, load_E = sum(load), jnp.asarray(load, jnp.int32)
    tail_N1 = (jnp.arange(len(args[0])) >= total)[:, None]
    dirty = (jnp.where(tail_N1, jnp.asarray(garbage, args[0].dtype), args[0]), *args[1:])
    result = value_and_grads(grouped_ffn, dirty, load_E, activation)
    expected = value_and_grads(one_by_one, args, load_E, activation)
    for got, want in zip(result, expected, strict=True):
        scale = max(1.0, float(jnp.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)
    y_ND, drows_ND = result[:2]
    assert not np.any(y_ND[total:]) and not np.any(drows_ND[total:])


def gradients(*args):
    return jax.grad(lambda *a: grouped_ffn(*a).sum(), argnums=(0, 1, 2, 3))(*args)


LOADS = {
    "even": [225, 225, 225, 225],
    "empty experts, a tail": [0, 523, 0, 30],
    "all to one": [0, 0, 900, 0],
    "none": [0, 0, 0, 0],
    "smaller and larger than a block": [700, 1, 33, 130],
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_equals_the_definition(load, gated):
    assert_equal_to_definition(arrays(900, 8, 12, 4, gated), load)


@pytest.mark.parametrize("activation", [jax.nn.gelu, jax.nn.sigmoid])
def test_any_activation(activation):  # sigmoid(0) is not 0: rows of no expert must still give 0
    assert_equal_to_definition(arrays(70, 8, 12, 3, False), [40, 0, 20], activation)


def test_rows_of_no_expert_contribute_nothing():
    for garbage in (1e30, np.inf, np.nan):
        assert_equal_to_definition(arrays(900, 8, 12, 4, True), [40, 3, 20, 700], garbage=garbage)


def of_tokens(x_TD, weight_N, w_in, w_gate, w_out, token_N, load_E, ffn):
    """What `tokens_ffn` gives, by a network of sorted rows."""
    y_ND = ffn(x_TD[token_N], w_in, w_gate, w_out, load_E, jax.nn.silu).astype(jnp.float32)
    y_ND = y_ND * jnp.where(jnp.arange(len(token_N)) < load_E.sum(), weight_N, 0)[:, None]
    expert_N = jnp.repeat(jnp.arange(len(load_E)), load_E, total_repeat_length=len(token_N))
    y_TD = jnp.zeros(x_TD.shape, jnp.float32).at[token_N].add(y_ND)
    return y_TD, jnp.zeros((len(load_E), x_TD.shape[1])).at[expert_N].add(y_ND)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("by", ["blocks", "ragged_dot", None])
@pytest.mark.parametrize("load", [[300, 0, 133, 467], [5, 0, 700, 40], [0, 0, 0, 0]], ids=str)
def test_tokens_in_tokens_out(load, by, gated, dtype):
    """Rows read where the tokens lie and added up there: values and gradients of tokens, of the
    rows' weights, of the experts' weights."""
    x_TD, w_in, w_gate, w_out = arrays(450, 8, 12, 4, gated, dtype)
    rng = np.random.default_rng(0)
    token_N = jnp.asarray(rng.permutation(np.repeat(np.arange(450), 2)), jnp.int32)
    weight_N = jnp.asarray(rng.uniform(0.1, 1, size=900), jnp.float32)
    trained, load_E = (x_TD, weight_N, w_in, w_gate, w_out), jnp.asarray(load, jnp.int32)

    def loss(trained, ffn):
        y_TD, output_ED = ffn(*trained)
        assert y_TD.dtype == output_ED.dtype == jnp.float32
        return jnp.sin(y_TD).sum(), (y_TD, output_ED)

    def ours(x_TD, weight_N, *weights):
        return tokens_ffn(x_TD, token_N, weight_N, *weights, load_E, by=by)

    def defined(*trained):
        trained = jax.tree.map(lambda a: a.astype(jnp.float32), trained)
        return of_tokens(*trained, token_N, load_E, one_by_one)

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    found, wanted = both(trained, ours), both(trained, defined)
    tolerance = 5e-2 if dtype == "bfloat16" else 2e-5
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        scale = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)


def test_sums_at_a_token_are_float32():
    """520 rows of 1: a sum in bfloat16 stops at 256."""
    x_TD, w = jnp.ones((1, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)
    token_N, weight_N = jnp.zeros(520, jnp.int32), jnp.ones(520)
    for by in ("blocks", "ragged_dot"):
        ffn = partial(tokens_ffn, activation=jax.nn.relu, by=by)
        y_TD, _ = jax.jit(ffn)(x_TD, token_N, weight_N, w, None, w, jnp.array([520]))
        assert y_TD.item() == 520


def test_what_a_kernel_leaves_in_rows_of_no_expert_contributes_nothing(monkeypatch):
    """tokamax's leave what they find, and multiply it by 0 in the weights' gradients."""

    @jax.custom_vjp
    def product(x, w, load_E):
        known = (jnp.arange(len(x)) < load_E.sum())[:, None]
        return jnp.where(known, jax.lax.ragged_dot(x, w, load_E), jnp.nan)

    def backward(kept, dy):
        x, w, load_E = kept
        dx = product(dy, w.swapaxes(1, 2), load_E)
        segment = jnp.repeat(jnp.eye(len(load_E)), load_E, axis=0, total_repeat_length=len(x))
        segment = segment * (jnp.arange(len(x)) < load_E.sum())[:, None]
        return dx, jnp.einsum("ne,nx,ny->exy", segment, x, dy), None

    product.defvjp(lambda *args: (product(*args), args), backward)
    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(ragged_dot=product))
    args, load_E = arrays(12, 4, 6, 3, gated=True), jnp.array([5, 0, 3])
    by_tokamax = partial(grouped_ffn, by="tokamax")
    found = value_and_grads(by_tokamax, args, load_E, jax.nn.silu)
    close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, found, value_and_grads(grouped_ffn, args, load_E, jax.nn.silu))


def test_cotangents_of_no_expert_contribute_nothing():
    args, load_E = arrays(50, 3, 5, 2, True), jnp.array([30, 3])
    pullback = jax.jit(lambda dy_ND: jax.vjp(lambda *a: grouped_ffn(*a, load_E), *args)[1](dy_ND))
    clean_ND = jnp.ones((50, 3)).at[33:].set(0)
    for garbage in (np.inf, np.nan):
        dirty = pullback(clean_ND.at[33:].set(garbage))
        for got, want in zip(dirty, pullback(clean_ND), strict=True):
            np.testing.assert_array_equal(got, want)


def test_bfloat16():
    load = [600, 0, 300, 40]
    args = arrays(1000, 16, 32, 4, True, jnp.bfloat16)
    assert_equal_to_definition(args, load, tolerance=5e-2)
    shapes = jax.eval_shape(gradients, *args, jnp.array(load))
    assert all(a.dtype == jnp.bfloat16 for a in shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_networks_as_wide_as_kernels_want_them(dtype):
    """What this machine chooses: on a GPU kernels, which take no narrower ones."""
    args = arrays(900, 256, 128, 4, True, dtype)
    tolerance = 5e-2 if dtype == "bfloat16" else 1e-4
    assert_equal_to_definition(args, [300, 0, 133, 400], tolerance=tolerance)
    assert choose(jax.default_backend(), sizes=Sizes(4, 256, 128, dtype)).why


def test_bfloat16_weight_gradients_accumulate_in_float32():
    # One weight, its gradient is the sum of the rows: 512 rows of 1, then 8 blocks that add 1 each.
    # Summed in bfloat16, whose numbers near 512 are 4 apart, each of these would be lost.
    rows_ND = jnp.ones((9 * 512, 1), jnp.bfloat16).at[512:].set(1 / 512)
    w = jnp.ones((1, 1, 1), jnp.bfloat16)
    load_E = jnp.array([9 * 512])
    dw = jax.jit(jax.grad(lambda w: grouped_ffn(rows_ND, w, None, w, load_E, jax.nn.relu).sum()))(w)
    assert dw.item() == 2 * 520  # as the input and as the output weight


@given(st.data())
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (50, 3, 5, 2), (600, 9, 1, 6)], ids=str)
def test_any_load(shape, data):
    """Any cut of the rows into experts and a tail; few shapes, as each is compiled."""
    num_rows, num_experts = shape[0], shape[-1]
    ends = st.lists(st.integers(0, num_rows), min_size=num_experts, max_size=num_experts)
    load = np.diff(sorted(data.draw(ends)), prepend=0).tolist()
    assert_equal_to_definition(arrays(*shape, gated=True), load, garbage=np.nan)


WEIGHT_GRADIENTS = {
    "compiler": products.compiler_weight_gradient,
    "TPU kernel": partial(products.kernel_weight_gradient, interpret=True),
}


@pytest.mark.parametrize("of_weights", WEIGHT_GRADIENTS.values(), ids=list(WEIGHT_GRADIENTS))
def test_all_paths_agree(of_weights):
    """The paths of other platforms, run here, against the blocks."""
    rows_ND, w_in, w_gate, w_out = arrays(300, 8, 12, 3, True)
    args = Rows(rows_ND.at[210:].set(3)), (w_in, w_gate), w_out, jnp.array([130, 0, 80])
    dy_ND = jnp.cos(jnp.arange(2400.0)).reshape(300, 8).at[210:].set(-2)
    silu = jax.nn.silu

    @partial(jax.jit, static_argnums=(0, 1))
    def both_ways(forward, backward):
        y_ND, pre = forward(silu, *args)
        drows, *dws = backward(silu, dy_ND, *args, pre)
        return jax.tree.leaves((y_ND[:210], drows.x[:210], dws))

    in_blocks = both_ways(blocks.forward, blocks.backward)
    kind = products.RAGGED._replace(of_weights=of_weights)
    ragged = both_ways(partial(products.forward, kind), partial(products.backward, kind))
    for a, b in zip(in_blocks, ragged, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_buffers_are_batched_products_of_which_free_slots_are_left_out(gated):
    """Rows [E, C, D], on a CPU and as on other platforms; what lies behind the load is zeros."""
    load_E = jnp.array([70, 0, 600])
    slot_C = jnp.arange(600)
    rows, w_in, w_gate, w_out = arrays(1800, 8, 12, 3, gated)
    rows = jnp.where(slot_C[None, :, None] < load_E[:, None, None], rows.reshape(3, 600, 8), 0)

    def batched(x, w_in, w_gate, w_out, load_E, activation):
        h = jnp.einsum("ecd,edf->ecf", x, w_in)
        if w_gate is not None:
            h = activation(jnp.einsum("ecd,edf->ecf", x, w_gate)) * h
        else:
            h = activation(h)
        return jnp.einsum("ecf,efd->ecd", h, w_out)

    args = (rows, w_in, w_gate, w_out)
    expected = value_and_grads(batched, args, load_E, jax.nn.silu)
    # A free slot is read by nobody: its gradient does not count, and the blocks do not make it.
    expected[1] = jnp.where(slot_C[None, :, None] < load_E[:, None, None], expected[1], 0)
    for got, want in zip(
        value_and_grads(grouped_ffn, args, load_E, jax.nn.silu), expected, strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    ins = (w_in,) if w_gate is None else (w_in, w_gate)
    y, pre = products.forward(products.BATCHED, jax.nn.silu, Rows(rows), ins, w_out, load_E)
    np.testing.assert_allclose(y, expected[0], rtol=1e-4, atol=1e-4)


def test_a_platform_can_be_asked_what_it_gets_and_why():
    assert choose("cpu").name == choose("cpu", buffers=True).name == "blocks"
    assert choose("tpu").name == "ragged_dot, kernel" and "0.10" in choose("tpu").why
    assert choose("cuda").name == "ragged_dot"
    assert choose("tpu", buffers=True).name == choose("cuda", buffers=True).name == "batched"


def test_under_remat_and_scan():
    args, load_E = arrays(96, 8, 12, 3, True), jnp.array([40, 3, 20])

    def twice(rows_ND, *weights):
        layer = jax.checkpoint(lambda x, _: (x + grouped_ffn(x, *weights, load_E), None))
        return jax.lax.scan(layer, rows_ND, None, length=2)[0].sum()

    def twice_by_hand(rows_ND, *weights):
        for _ in range(2):
            rows_ND += one_by_one(rows_ND, *weights, load_E, jax.nn.silu)
        return rows_ND.sum()

    of = (0, 1, 2, 3)
    result, expected = (jax.jit(jax.grad(f, of))(*args) for f in (twice, twice_by_hand))
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_weights_shared_by_shards_of_rows():
    """In shard_map the gradient of shared weights is summed over the shards, like any other's."""
    args, load_E = arrays(128, 8, 12, 3, True), jnp.array([20, 3, 30, 0, 64, 0])
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    data, whole = jax.P("data"), jax.P()

    def sharded(*args):
        specs = (data, whole, whole, whole, data)
        ffn = jax.shard_map(grouped_ffn, mesh=mesh, in_specs=specs, out_specs=data)
        return ffn(*args, load_E)

    def shard_by_shard(*args):
        rows_SND, load_SE = args[0].reshape(2, 64, 8), load_E.reshape(2, 3)
        parts = [one_by_one(rows_SND[s], *args[1:], load_SE[s], jax.nn.silu) for s in range(2)]
        return jnp.concatenate(parts)

    def loss(ffn):
        return lambda *args: jnp.sin(ffn(*args)).sum()

    of = (0, 1, 2, 3)
    with jax.set_mesh(mesh):
        specs = (data, whole, whole, whole)
        placed = [
            jax.device_put(a, jax.NamedSharding(mesh, p)) for a, p in zip(args, specs, strict=True)
        ]
        load_E = jax.device_put(load_E, jax.NamedSharding(mesh, data))
        result = jax.jit(jax.grad(loss(sharded), of))(*placed)
    load_E = jnp.array([20, 3, 30, 0, 64, 0])
    expected = jax.jit(jax.grad(loss(shard_by_shard), of))(*args)
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_other_platforms_use_ragged_dot():
    traced = jax.jit(gradients).trace(*arrays(96, 8, 12, 3, True), jnp.array([40, 3, 20]))
    cuda, tpu = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "tpu"))
    assert "ragged_dot" in cuda and "stablehlo.while" not in cuda
    # The three weight gradients are kernels (of two shapes), the five other products are not.
    assert "ragged_dot" in tpu and tpu.count("@tpu_custom_call") == 2
    assert "tpu_custom_call" not in cuda


def test_on_a_cpu_no_array_holds_all_rows_of_tokens():
    args = arrays(1024, 24, 40, 4, True)
    token_N = jnp.arange(2048) % 1024

    def loss(x_TD, *weights):
        y_TD, _ = tokens_ffn(x_TD, token_N, jnp.ones(2048), *weights, jnp.full(4, 512))
        return jnp.square(y_TD).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*args).compile().as_text()
    assert "f32[2048,40]" in text and "f32[1024,24]" in text and "f32[2048,24]" not in text


def test_cpu_memory_is_linear_in_the_rows():
    num_rows, width, hidden, num_experts = 2048, 24, 40, 7
    args = arrays(num_rows, width, hidden, num_experts, True)
    compiled = jax.jit(gradients).lower(*args, jnp.full(num_experts, 292)).compile()
    shapes = re.findall(r"\bf32\[([\d,]+)\]", compiled.as_text())
    elements = {s: np.prod([int(n) for n in s.split(",")]) for s in shapes}
    assert f"{num_rows},{hidden}" in elements
    # Nothing has more elements than the hidden rows: no [N, E, ...], no weight a block.
    assert max(elements.values()) <= num_rows * hidden, elements
    rows = num_rows * (width + 2 * hidden) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * rows
