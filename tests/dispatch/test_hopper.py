"""JAX's kernels for Hopper: what they lower to everywhere, and their numbers where JAX (0.11) can
run them without a GPU."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from moejax.dispatch import hopper, trial
from moejax.dispatch.grouped import IMPLEMENTATIONS, grouped_ffn

LOAD_E = jnp.array([70, 0, 100])  # 170 of 203 rows, no boundary and no end on a tile's


@pytest.fixture(autouse=True)
def chip(monkeypatch):
    """A GPU as far as the kernels ask for one: how many processors it has."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(core_count=2)])


def arrays(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    shapes = (203, 128), (3, 128, 256), (203, 256)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def test_every_product_of_forward_and_backward_is_a_kernel():
    x_ND, w_in, _ = arrays()
    args = x_ND, w_in, w_in, w_in.swapaxes(1, 2), LOAD_E

    def loss(by, *args):
        return grouped_ffn(*args, by=by).astype(jnp.float32).sum()

    def kernels(by):
        gradients = jax.jit(jax.grad(loss, (1, 2, 3, 4)), static_argnums=0)
        text = gradients.trace(by, *args).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("custom_call @mosaic_gpu"), text.count('= "chlo.ragged_dot"')

    # Forward 3, of which this loss does not need y's; backward 3 for rows and 3 for weights.
    assert kernels("hopper") == (8, 0)


def test_what_a_trial_runs_is_taken():
    """A trial that they refuse is lost, and nobody sees it: another implementation is chosen."""
    for sizes in (trial.Sizes(4, 256, 128, "bfloat16"), trial.Sizes(64, 128, 256, "bfloat16")):
        traced = trial._jitted(IMPLEMENTATIONS["hopper"]).trace(*trial._arguments(sizes))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == 9


def test_what_the_kernels_do_not_take_is_refused():
    x_NX, w_EXY, dy_NY = arrays(jnp.float32)
    with pytest.raises(NotImplementedError, match="take 16-bit numbers, not float32"):
        hopper.dot(x_NX, w_EXY, LOAD_E)
    x_NX, w_EXY, dy_NY = arrays()
    with pytest.raises(NotImplementedError, match=r"widths \(120, 256\) are not multiples of 128"):
        hopper.of_weights(x_NX[:, :120], w_EXY[:, :120], dy_NY, LOAD_E)


if hasattr(mosaic_gpu, "force_gpu_interpret_mode"):  # JAX 0.11

    def test_products_are_right_at_uneven_loads():
        """An expert without rows, and rows of no expert, of which nothing may be seen."""
        x_NX, w_EXY, dy_NY = arrays()
        x_NX, dy_NY = x_NX.at[170:].set(3), dy_NY.at[170:].set(2)
        with mosaic_gpu.force_gpu_interpret_mode():
            found = [
                hopper.dot(x_NX, w_EXY, LOAD_E),
                hopper.of_rows(dy_NY, w_EXY, LOAD_E),
                hopper.of_weights(x_NX, w_EXY, dy_NY, LOAD_E),
            ]
        x, w, dy = (np.asarray(a, np.float64) for a in (x_NX, w_EXY, dy_NY))
        y, dx, dw = np.zeros((203, 256)), np.zeros((203, 128)), np.zeros((3, 128, 256))
        for e, own in ((0, slice(0, 70)), (2, slice(70, 170))):
            y[own], dx[own], dw[e] = x[own] @ w[e], dy[own] @ w[e].T, x[own].T @ dy[own]
        for got, wanted in zip(found, (y, dx, dw), strict=True):
            off = np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)
            assert off < 3e-3
        assert not np.any(found[0][170:]) and not np.any(found[1][170:])
