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


@pytest.mark.parametrize(("devices", "seed"), [(2, 0), (4, 1), (8, 2)])
def test_random_sizes_against_loops(devices: int, seed: int) -> None:
    """Rows of three numbers; every device sends every other one up to three rows, some none."""
    random = np.random.default_rng(seed)
    send = random.integers(0, 4, (devices, devices))
    rows, space = int(send.sum(1).max()), int(send.sum(0).max()) + 2
    operand = random.normal(size=(devices, rows, 3)).astype(np.float32)
    begin = np.cumsum(send, 1) - send
    place = np.cumsum(send, 0) - send  # where device j writes what comes from i, before any gap
    want = np.full((devices, space, 3), -1.0, np.float32)
    for i in range(devices):
        for j in range(devices):
            rows_ij = operand[i, begin[i, j] : begin[i, j] + send[i, j]]
            want[j, place[i, j] : place[i, j] + send[i, j]] = rows_ij
    sizes = [jnp.asarray(a, jnp.int32) for a in (begin, send, place, send.T)]
    got = run(devices, jnp.asarray(operand), jnp.full((devices, space, 3), -1.0), *sizes)
    np.testing.assert_array_equal(got, want)
