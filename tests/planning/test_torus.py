"""A mesh on TPUs: its neighbours are neighbours on the torus, slices meet along `data`."""

import numpy as np
import pytest
from jax.experimental import topologies

from moejax.config import MeshConfig
from moejax.planning.chips import parse_topology
from moejax.planning.topology import topology_devices
from moejax.sharding import device_grid, make_mesh


def hops(grid: np.ndarray, axis: int) -> float:
    """Links between neighbours along an axis of the mesh, mean; the torus is closed."""
    xyz = np.array([device.coords for device in grid.ravel()]).reshape(*grid.shape, 3)
    sides = xyz.reshape(-1, 3).max(0) + 1
    apart = np.abs(xyz - np.roll(xyz, 1, axis))
    return float(np.minimum(apart, sides - apart).sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "fsdp", "expert", "in_order"),
    [("v5e:16x16", 16, 16, 9.0), ("v5p:4x4x4", 16, 4, 3.25), ("v5p:8x8x16", 128, 8, 5.125)],
)
def test_neighbours_of_the_mesh_are_neighbours_on_the_torus(
    name: str, fsdp: int, expert: int, in_order: float
) -> None:
    devices = topology_devices(parse_topology(name))
    grid = make_mesh(MeshConfig(data=1, fsdp=fsdp, expert=expert), list(devices)).devices
    assert sorted(d.id for d in grid.ravel()) == sorted(d.id for d in devices)
    assert hops(grid, 2) == 1.0 and hops(grid, 1) <= 1.25
    # What the devices' own order would cost.
    assert hops(np.array(devices).reshape(grid.shape), 1) == in_order


def test_cores_of_one_chip_keep_their_order() -> None:
    devices = topology_devices(parse_topology("v4:2x2x2"))
    assert len(devices) == 16
    assert device_grid(list(devices), (1, 4, 4, 1)).ravel().tolist() == list(devices)


def test_slices_lie_along_data() -> None:
    topology_devices(parse_topology("v5e:4x4"))  # sets what libtpu needs
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2)
    grid = device_grid(list(found.devices), (2, 4, 4, 1))
    assert [{d.slice_index for d in part.ravel()} for part in grid] == [{0}, {1}]
    with pytest.raises(ValueError, match="mesh.data=1 is not divisible by the 2 TPU slices"):
        device_grid(list(found.devices), (1, 8, 4, 1))
