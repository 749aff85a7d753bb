"""The mesh and its table: every parameter has a rule, arrays lie as it says, misfits name
numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig
from moejax.sharding import (
    BATCH_AXES,
    SHARDINGS,
    batch_sharding,
    check_batch,
    make_mesh,
    param_shardings,
)
from moejax.training.optimizer import make_optimizer
from moejax.training.state import init_state, shardings
from tests import tiny

MESH = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
SIZES = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}

LAYOUTS = {
    **tiny.ARMS,
    "shared": {"moe": {"shared": 1}},
    "soft": {"moe": {"slots": 2}},
    "selectors": {"router": {"name": "dselect_k"}},
    "first dense": {"moe": {"first_dense": 1}},
    "every second": {"moe": {"every": 2}},
    "no gate": {"model": {"activation": "gelu"}},
    "grouped heads": {"model": {"heads": 4, "kv_heads": 2}},
    "adafactor": {"optimizer": {"name": "adafactor"}},
}


def abstract(layout):
    config = tiny.tiny(**LAYOUTS[layout])
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    init = functools.partial(init_state, config=config, optimizer=optimizer)
    return jax.eval_shape(lambda: init(0, vocab_size=tiny.VOCABULARY))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_has_a_rule_and_lies_as_it_says(layout):
    """Recomputed from the table: one letter a dimension, stacked layer axes in front and whole."""
    state = abstract(layout)
    where = shardings(state, make_mesh(MESH))
    leaves = jax.tree.leaves_with_path(state.params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(where.params), strict=True):
        name = path[-1].key
        letters = name.rpartition("_")[2]
        parts = [1] * (leaf.ndim - len(letters))
        parts += [SIZES.get(axis, 1) for axis in (*SHARDINGS[name], *[None] * len(letters))]
        expected = tuple(n // part for n, part in zip(leaf.shape, parts, strict=False))
        assert sharding.shard_shape(leaf.shape) == expected, name


@pytest.mark.parametrize("layout", ["switch", "loss_free", "first dense"])
def test_adams_moments_lie_like_their_parameters(layout):
    state = abstract(layout)
    where = shardings(state, make_mesh(MESH))
    (adam,) = (
        part
        for part in jax.tree.leaves(where.opt_state, is_leaf=_has_moments)
        if _has_moments(part)
    )
    assert adam.mu == adam.nu == where.params
    assert any(sharding.spec != P() for sharding in jax.tree.leaves(adam.mu))


def _has_moments(node):
    return hasattr(node, "mu")


def test_adafactors_rows_and_columns_are_copies():
    """They are of other shapes than their parameter: its rule does not fit them."""
    state = abstract("adafactor")
    where = shardings(state, make_mesh(MESH))
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    pairs = zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(where.opt_state), strict=True)
    others = [sharding for leaf, sharding in pairs if leaf.shape not in shapes]
    assert others and all(sharding.is_fully_replicated for sharding in others)


def test_a_state_is_born_in_shards():
    """Each device holds its own piece of the weights: an eighth of the expert weights in all."""
    mesh = make_mesh(MESH)
    config = tiny.tiny(**tiny.ARMS["loss_free"])
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    init = functools.partial(
        init_state, config=config, vocab_size=tiny.VOCABULARY, optimizer=optimizer
    )
    where = shardings(jax.eval_shape(init, 0), mesh)
    state = jax.jit(init, out_shardings=where)(0)
    found = {path[-1].key: leaf for path, leaf in jax.tree.leaves_with_path(state.params)}
    assert found["w_in_EDF"].shape == (2, 4, 16, 32)
    assert shard_shapes(found["w_in_EDF"]) == {(2, 2, 8, 16)}
    assert shard_shapes(found["w_out_EFD"]) == {(2, 2, 16, 8)}
    assert shard_shapes(found["embed_VD"]) == {(128, 8)}
    assert shard_shapes(found["w_router_DE"]) == {(2, 16, 4)}  # everybody needs it
    whole = np.asarray(found["w_in_EDF"])
    for shard in found["w_in_EDF"].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])


def shard_shapes(array):
    assert len(array.addressable_shards) == 8
    return {shard.data.shape for shard in array.addressable_shards}


def test_a_batch_is_cut_over_all_axes_but_tensor():
    mesh = make_mesh(MESH)
    batch_BS = jax.device_put(jnp.arange(8 * 32).reshape(8, 32), batch_sharding(mesh))
    assert math.prod(SIZES[axis] for axis in BATCH_AXES) == 4
    assert shard_shapes(batch_BS) == {(2, 32)}


def test_a_parameter_without_a_rule_is_refused_by_its_whole_path():
    params = {"stacks": [{"w_new_XY": jnp.ones((2, 2))}]}
    with pytest.raises(KeyError, match=r"parameter stacks/.*/w_new_XY has no rule in SHARDINGS"):
        param_shardings(params, make_mesh(MESH))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w_in_EDF", (3, 4, 4), "w_in_EDF: E=3 is not divisible by mesh axis expert=2"),
        ("w_in_EDF", (9, 4, 5, 4), "w_in_EDF: D=5 is not divisible by mesh axis fsdp=2"),
        ("embed_VD", (257, 4), "embed_VD: V=257 is not divisible by mesh axis tensor=2"),
        ("w_query_DHA", (4, 1, 4), "w_query_DHA: H=1 is not divisible by mesh axis tensor=2"),
    ],
)
def test_a_dimension_that_is_not_divisible_names_both_numbers(name, shape, message):
    with pytest.raises(ValueError, match=message):
        param_shardings({name: jnp.ones(shape)}, make_mesh(MESH))


def test_a_batch_that_is_not_divisible_names_both_numbers():
    mesh = make_mesh(MESH)
    check_batch(12, mesh)
    with pytest.raises(ValueError, match="batch 10 is not divisible by data x fsdp x expert = 4"):
        check_batch(10, mesh)


def test_an_axis_of_minus_one_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "expert": 1,
        "tensor": 2,
    }
    mesh = make_mesh(MeshConfig(data=1, expert=-1), jax.devices()[:4])
    assert mesh.shape["expert"] == 4


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=-1, expert=3), "8 devices are not divisible by 3"),
        (MeshConfig(data=2, expert=2), "needs 4 devices, there are 8"),
        (MeshConfig(data=4, fsdp=4), "needs 16 devices, there are 8"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_the_devices_names_both_numbers(mesh, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(mesh)
