"""The mesh and the one table that says how each kind of array lies on it.

Axes: `data` and `fsdp` and `expert` cut the batch; `fsdp` and `tensor` cut weights; `expert` cuts
experts. A rule that does not apply is an error that names both numbers, never a silent copy.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig
from moejax.dispatch import BATCH_AXES

SHARDINGS: dict[str, P] = {
    "embed_VD": P("tensor", "fsdp"),
    "unembed_DV": P("fsdp", "tensor"),
    "scale_D": P(),
    "w_query_DHA": P("fsdp", "tensor", None),
    "w_key_DGA": P("fsdp", "tensor", None),
    "w_value_DGA": P("fsdp", "tensor", None),
    "w_out_HAD": P("tensor", None, "fsdp"),
    "w_query_DQ": P("fsdp", None),  # latents stay whole, heads are cut
    "w_latent_DU": P("fsdp", None),
    "w_position_DR": P("fsdp", None),
    "w_query_QHC": P("fsdp", "tensor", None),
    "w_key_UHA": P("fsdp", "tensor", None),
    "w_value_UHA": P("fsdp", "tensor", None),
    "w_in_DF": P("fsdp", "tensor"),
    "w_gate_DF": P("fsdp", "tensor"),
    "w_out_FD": P("tensor", "fsdp"),
    "w_router_DE": P(),
    "w_extra_DX": P(),
    "phi_DZ": P(),
    "scale_1": P(),
    "w_in_EDF": P("expert", "fsdp", "tensor"),
    "w_gate_EDF": P("expert", "fsdp", "tensor"),
    "w_out_EFD": P("expert", "tensor", "fsdp"),
    "batch_B": P(BATCH_AXES),
    "embed_read_VD": P("tensor", None),
    "x_BSD": P(BATCH_AXES, None, None),
    "kept_LBMGA": P(None, BATCH_AXES, None, P.UNCONSTRAINED, None),
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a config over the given devices (default: all).

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or TPU slices do not divide
        the axis `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    grid = device_grid(devices, tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def device_grid(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices in the form of a mesh, `data` first: [data, fsdp, expert, tensor].

    TPUs lie on a torus: there, devices along an axis are neighbours. Between slices of TPUs, which
    only a data-centre network joins, lies `data`. Elsewhere the order is the devices' own.
    """
    cores = {getattr(device, "core_on_chip", 0) for device in devices}
    # mesh_utils refuses two devices a chip, bar those of TPU7x.
    apart = len(cores) > 1 and "7x" not in devices[0].device_kind
    if devices[0].platform != "tpu" or apart:
        return np.array(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise ValueError(
            f"mesh.data={shape[0]} is not divisible by the {slices} TPU slices that it lies across"
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]),
        (slices, *(1,) * (len(shape) - 1)),
        devices,
        allow_split_physical_axes=True,
    )


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Axis -> size for so many devices, in the order of `make_mesh`, which raises the same."""
    sizes = {axis: getattr(config, axis) for axis in ("data", "fsdp", "expert", "tensor")}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        if devices % fixed:
            raise ValueError(f"mesh {sizes}: {devices} devices are not divisible by {fixed}")
        sizes = {a: devices // fixed if s == -1 else s for a, s in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ValueError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, there are {devices}"
        )
    return sizes


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raises ValueError where the batch axes of the mesh do not divide the (micro)batch."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch % parts:
        raise ValueError(
            f"batch {batch} is not divisible by data x fsdp x expert = {parts} of mesh "
            f"{dict(mesh.shape)}; change data.batch, train.accumulation or mesh"
        )


def constrain(a: jax.Array, name: str) -> jax.Array:
    """An activation, cut as SHARDINGS says where a mesh is set (`jax.set_mesh`); else as it is.

    Left alone, the compiler may cut activations along the weights' axes and move them whole.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return a
    return jax.lax.with_sharding_constraint(a, SHARDINGS[name])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of any array whose first axis is the batch."""
    return NamedSharding(mesh, SHARDINGS["batch_B"])


def local_rows(batch: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that lie on this process's devices, in order: int [rows].

    Processes that only share weights hold the same rows; all together they hold every row.
    """
    shards = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[shard] for shard in shards]))


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each parameter, looked up by the last part of its path.

    Parameters with more axes than their rule are stacked over layers; that axis stays whole.

    Raises:
      KeyError: a parameter without a rule.
      ValueError: a mesh axis that does not divide the dimension it should cut.
    """
    return jax.tree.map_with_path(lambda path, leaf: _sharding(path, leaf, mesh), params)


def state_shardings(state: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer state: moments lie like their parameter, all else is replicated.

    A moment is recognised by ending in the path and having the shape of a parameter.
    """
    flat = jax.tree.leaves_with_path(params)
    like = {(_names(path), leaf.shape): _sharding(path, leaf, mesh) for path, leaf in flat}
    names = {name for name, _ in like}

    def lookup(path: Any, leaf: Any) -> NamedSharding:
        keys = _names(path)
        for start in range(len(keys)):
            if keys[start:] in names:
                return like.get((keys[start:], leaf.shape), NamedSharding(mesh, P()))
        return NamedSharding(mesh, P())

    return jax.tree.map_with_path(lookup, state)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _sharding(path: Any, leaf: Any, mesh: Mesh) -> NamedSharding:
    name = _names(path)[-1]
    if name not in SHARDINGS:
        raise KeyError(f"parameter {'/'.join(_names(path))} has no rule in SHARDINGS")
    rule = SHARDINGS[name]
    axes = name.rpartition("_")[2]
    stacked = leaf.ndim - len(axes)
    spec = P(*(None,) * stacked, *rule)
    for letter, axis, size in zip(axes, rule, leaf.shape[stacked:], strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name}: {letter}={size} is not divisible by mesh axis {axis}={mesh.shape[axis]}"
            )
    return NamedSharding(mesh, spec)
