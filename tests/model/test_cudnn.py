"""Attention by cuDNN's kernel: which programs have it, and its numbers against the products'.

Where no GPU is, JAX is told of one, as far as it asks before it compiles.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from moejax.config import MeshConfig
from moejax.model import attend as products
from moejax.model import cudnn
from moejax.model.attend import attend, attention_mask
from moejax.sharding import make_mesh

SEGMENT_BS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (2, 64)), 1), jnp.int32)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(
        fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda _: False
    )
    cudnn._taken.cache_clear()
    yield
    cudnn._taken.cache_clear()


def arrays(length=64, kv_heads=4, width=64, value_width=64, dtype=jnp.bfloat16):
    random = np.random.default_rng(1)
    shapes = (4, width), (kv_heads, width), (kv_heads, value_width)
    return [jnp.asarray(random.normal(size=(2, length, *shape)), dtype) for shape in shapes]


def both(mask, block=0):
    """Values and the gradients of all three."""

    def loss(*arrays):
        y_BSHA = attend(*arrays, mask, block).astype(jnp.float32)
        return jnp.sin(y_BSHA).sum(), y_BSHA

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def program(platform, given, mask):
    lowered = both(mask).trace(*given).lower(lowering_platforms=(platform,))
    return lowered.as_text()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_programs_for_gpus_have_the_kernel_and_no_products(gpu, kv_heads, causal):
    given, mask = arrays(kv_heads=kv_heads), attention_mask(SEGMENT_BS, causal=causal)
    text = program("cuda", given, mask)
    # The values, those again for the gradients, and the gradients.
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == 2
    assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert "dot_general" not in text
    for other in ("tpu", "cpu"):
        text = program(other, given, mask)
        assert "cudnn" not in text and "dot_general" in text


@pytest.mark.parametrize(
    "other",
    [{"length": 63}, {"dtype": jnp.float32}, {"width": 60}, {"value_width": 32}],
    ids=lambda other: next(iter(other)),
)
def test_what_it_does_not_take_is_left_to_products(gpu, other):
    mask = attention_mask(SEGMENT_BS[:, : other.get("length", 64)])
    assert cudnn.takes(*arrays(), attention_mask(SEGMENT_BS).seen_BSM)
    assert not cudnn.takes(*arrays(**other), mask.seen_BSM)
    text = program("cuda", arrays(**other), mask)
    assert "cudnn" not in text and "dot_general" in text


def test_several_devices_and_other_platforms_have_products(gpu, monkeypatch):
    given = *arrays(), attention_mask(SEGMENT_BS).seen_BSM
    with jax.set_mesh(make_mesh(MeshConfig(data=2), jax.devices()[:2])):
        assert not cudnn.takes(*given)
    assert cudnn.takes(*given)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not cudnn.takes(*given)


def test_where_the_kernel_is_not_compiled_for_numbers_are_the_products(gpu, monkeypatch):
    """A GPU is here, and the program is for a CPU."""
    mask, asked = attention_mask(SEGMENT_BS), []
    by_products = products._by_products
    monkeypatch.setattr(
        products, "_by_products", lambda *a: asked.append(len(a)) or by_products(*a)
    )
    found = both(mask)(*arrays())
    monkeypatch.setattr(cudnn, "takes", lambda *_: False)
    wanted = both(mask)(*arrays())
    assert len(asked) > 2  # inside the two rules, and without them
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_of_widths_that_the_kernel_takes(kv_heads, causal, block):
    """By what this machine has, on a GPU the kernel, in bfloat16 against float32."""
    mask = attention_mask(SEGMENT_BS, causal=causal)
    given = arrays(kv_heads=kv_heads)
    assert cudnn.takes(*given, mask.seen_BSM) == (jax.default_backend() == "gpu")
    found = both(mask, block)(*given)
    wanted = both(mask)(*(a.astype(jnp.float32) for a in given))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.01 * jnp.linalg.norm(b)
