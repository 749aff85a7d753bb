"""Cross entropy by pieces: the same numbers and gradients, on a mesh too, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig
from moejax.dispatch import BATCH_AXES
from moejax.model.transformer import logits
from moejax.sharding import make_mesh
from moejax.training import cross_entropy as file
from moejax.training.cross_entropy import cross_entropy, pieces
from tests import tiny

ROWS, LENGTH, DIM, VOCAB = 8, 12, 4, 34  # 34 / 8 rounded up is 5: six pieces


def arrays():
    random = np.random.default_rng(0)
    x_BSD = jnp.asarray(random.normal(size=(ROWS, LENGTH, DIM)), jnp.float32)
    w_DV = jnp.asarray(random.normal(size=(DIM, VOCAB)), jnp.float32)
    return x_BSD, w_DV, jnp.asarray(random.integers(0, VOCAB, (ROWS, LENGTH)))


def both(nll, x_BSD, w_DV, target_BS):
    """nll, and the gradients of a sum in which every token counts otherwise."""

    def loss(x_BSD, w_DV):
        nll_BS = nll(x_BSD, w_DV, target_BS)
        return (nll_BS * jnp.cos(jnp.arange(1.0 * nll_BS.size)).reshape(nll_BS.shape)).sum(), nll_BS

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x_BSD, w_DV)


def at_once(x_BSD, w_DV, target_BS):
    return optax.softmax_cross_entropy_with_integer_labels(logits(x_BSD, w_DV), target_BS)


@pytest.mark.parametrize(
    "mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "expert": 4, "tensor": 2}]
)
def test_pieces_give_what_all_logits_give(monkeypatch, mesh) -> None:
    monkeypatch.setattr(file, "FEW", 0)
    monkeypatch.setattr(file, "ENOUGH", 1)
    assert pieces(ROWS, LENGTH, DIM, VOCAB) == 6
    x_BSD, w_DV, target_BS = arrays()
    x_BSD = x_BSD.at[3, 2].mul(100)  # exp of these logits overflows
    expected = both(at_once, x_BSD, w_DV, target_BS)
    if mesh is not None:
        made = make_mesh(MeshConfig(**mesh))
        cut = NamedSharding(made, P(BATCH_AXES))
        x_BSD, target_BS = jax.device_put((x_BSD, target_BS), cut)
        w_DV = jax.device_put(w_DV, NamedSharding(made, P("fsdp", "tensor")))
        with jax.set_mesh(made):
            found = both(cross_entropy, x_BSD, w_DV, target_BS)
    else:
        found = both(cross_entropy, x_BSD, w_DV, target_BS)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_a_few_logits_are_not_cut_and_many_never_dominate() -> None:
    assert pieces(1, 4096, 64, 256) == 1
    assert pieces(1, 4096, 4096, 32000) == 4
    assert pieces(2, 4096, 7168, 129280) == 16  # 10 would be enough, but is no divisor
    assert pieces(1, 4096, 2048, 102400) == 8 and pieces(8, 4096, 2048, 102400) == 32  # 25, if many
    assert pieces(1, 256, 64, 32000) == 1  # fewer tokens than are enough
    assert pieces(64, 4099, 64, 32000) == 4099  # a prime


def test_memory_is_that_of_a_piece() -> None:
    shapes = (32, 512, 16), (16, 8192), (32, 512)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[:2]]
    arguments.append(jax.ShapeDtypeStruct(shapes[2], jnp.int32))
    all_logits = 32 * 512 * 8192 * 4

    def temporaries(nll) -> int:
        gradient = jax.jit(jax.grad(lambda x, w, t: nll(x, w, t).sum(), argnums=(0, 1)))
        return gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(at_once) > all_logits
    assert temporaries(cross_entropy) < 0.1 * all_logits


def test_a_whole_step_by_pieces_has_the_same_loss(monkeypatch, config) -> None:
    """Through the model and the training step's own path."""
    from moejax.training.state import make_graph
    from moejax.training.step import loss_fn
    from tests.training.test_upcycle import params_of

    graph, params = make_graph(config, tiny.VOCABULARY), params_of(config, tiny.VOCABULARY)
    batch = tiny.dataset().train_batch(0, seed=0)
    state = jnp.zeros((config.moe_layers, config.moe.experts))

    def run():
        call = lambda p: loss_fn(p, state, batch, jax.random.key(0), graph, config)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(call))(params)

    expected = run()
    monkeypatch.setattr(file, "FEW", 0)
    monkeypatch.setattr(file, "ENOUGH", 1)
    found = run()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
