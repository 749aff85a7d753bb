"""The ragged all-to-all that CPUs lack: value and gradient, on simulated devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moejax.dispatch.exchange import ragged_all_to_all
from tests.oracle import case, check


def run(devices: int, *arrays: jax.Array) -> jax.Array:
    """Row i of every array is device i's; so is row i of the result."""
    mesh = jax.make_mesh((devices,), ("expert",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    def exchange(*rows: jax.Array) -> jax.Array:
        return ragged_all_to_all(*(row[0] for row in rows), axis_name="expert")[None]

    return jax.jit(exchange)(*arrays)


def test_case_of_jax_value_and_gradient() -> None:
    found = case("collectives/jax_ragged_all_to_all_2")
    given, derived = found["inputs"], found["derived"]
    names = ("input_offsets", "send_sizes", "output_offsets", "recv_sizes")
    sizes = [jnp.asarray(given[name], jnp.int32) for name in names]
    operand = jnp.asarray(given["operand"], jnp.float32)
    start = jnp.zeros(given["output_shape"])
    check(found, "output", run(2, operand, start, *sizes))
    cotangent = jnp.asarray(derived["cotangent"], jnp.float32)

    def loss(operand: jax.Array, start: jax.Array) -> jax.Array:
        return (run(2, operand, start, *sizes) * cotangent).sum()

    operand_grad, start_grad = jax.grad(loss, argnums=(0, 1))(operand, start)
    check(found, "operand_grad", operand_grad, derived["operand_grad"])
    check(found, "initial_output_grad", start_grad, derived["initial_output_grad"])


@pytest.mark.parametrize(
    ("devices", "slices", "seed"), [(2, 1, 0), (4, 1, 1), (8, 1, 2), (4, 3, 3)]
)
def test_random_sizes_against_loops(devices: int, slices: int, seed: int) -> None:
    """Rows of three numbers; every device sends every other one slices of up to three rows, some of
    none, which arrive in the order of slices, not of devices."""
    random = np.random.default_rng(seed)
    send = random.integers(0, 4, (devices, devices, slices))
    rows, space = int(send.sum((1, 2)).max()), int(send.sum((0, 2)).max()) + 2
    operand = random.normal(size=(devices, rows, 3)).astype(np.float32)

    def starts(a: np.ndarray) -> np.ndarray:
        flat = a.reshape(devices, -1)
        return (np.cumsum(flat, 1) - flat).reshape(a.shape)

    begin = starts(send)
    # Of device j: first all that comes for slice 0, then for slice 1, and a gap of two rows.
    place = starts(send.transpose(1, 2, 0)).transpose(2, 0, 1)
    want = np.full((devices, space, 3), -1.0, np.float32)
    for i, j, k in np.ndindex(send.shape):
        at, size = begin[i, j, k], send[i, j, k]
        want[j, place[i, j, k] : place[i, j, k] + size] = operand[i, at : at + size]
    sizes = [
        jnp.asarray(a.reshape(devices, -1), jnp.int32)
        for a in (begin, send, place, send.swapaxes(0, 1))
    ]
    start = jnp.full((devices, space, 3), -1.0)
    np.testing.assert_array_equal(run(devices, jnp.asarray(operand), start, *sizes), want)

    def loss(operand: jax.Array) -> jax.Array:
        return (run(devices, operand, start, *sizes) * jnp.where(want < 0, 1.0, want)).sum()

    # Each row is found once at most: its gradient is what stands where it went.
    gradient = np.asarray(jax.grad(loss)(jnp.asarray(operand)))
    for i, j, k in np.ndindex(send.shape):
        at, size = begin[i, j, k], send[i, j, k]
        there = want[j, place[i, j, k] : place[i, j, k] + size]
        np.testing.assert_array_equal(gradient[i, at : at + size], np.where(there < 0, 1.0, there))
