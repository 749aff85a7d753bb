"""The collectives of a compiled program: kind, mesh axes, how often, and how many bytes."""

import itertools
import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from moejax.planning.hlo import Instruction, Module, parse
from moejax.planning.loops import Runs, runs

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of KINDS.
      axes: the mesh axes along which devices talk, e.g. 'expert' or 'data,fsdp'.
      group: devices that talk to each other, the numbers of the first group.
      bytes: of one call on one device: the whole array that is gathered, reduced or scattered, or
        what an all-to-all sends. Of a ragged one, the smaller of its two buffers: a device never
        sends more at an even load.
      times: calls in one step.
      backward: whether it stands in the backward pass.
      op_name: where it comes from.
    """

    kind: str
    axes: str
    group: tuple[int, ...]
    bytes: int
    times: int
    backward: bool
    op_name: str


def between_devices(compiled: Compiled, mesh: Mesh) -> list[Collective]:
    """What a compiled program sends between the devices of the mesh that it was compiled for."""
    module = parse(compiled.as_text() or "")
    return collectives(module, runs(module), dict(mesh.shape))


def collectives(module: Module, times: Runs, mesh: dict[str, int]) -> list[Collective]:
    """All between more than one device. `mesh`: axis -> size, in the order of the devices."""
    found = []
    callers = _callers(module)
    for name, calls in times.times.items():
        for instruction in module.computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if name.startswith("all-reduce-scatter"):  # TPU: fused with the slice that is kept
                kind = "reduce-scatter"
            op_name = instruction.op_name or callers.get(name, "")
            group = first_group(instruction.attributes, math.prod(mesh.values()))
            if len(group) < 2:
                continue
            found.append(
                Collective(
                    kind=kind,
                    axes=axes_of(group, mesh),
                    group=group,
                    bytes=_bytes(module, name, instruction, kind, len(group)),
                    times=calls,
                    backward="transpose(" in op_name,
                    op_name=op_name,
                )
            )
    return found


def _callers(module: Module) -> dict[str, str]:
    """The op_name of the last instruction that calls a computation."""
    return {
        callee: instruction.op_name
        for computation in module.computations.values()
        for instruction in computation.values()
        for callee in instruction.called()
        if instruction.opcode != "while"
    }


def _bytes(module: Module, name: str, instruction: Instruction, kind: str, group: int) -> int:
    shapes = [module.shape(name, operand) for operand in instruction.operands]
    if kind == "ragged-all-to-all":
        return min(shapes[0].bytes, shapes[1].bytes)
    sent = sum(shape.bytes for shape in shapes)
    return sent * group if kind == "all-gather" else sent


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """The devices of the first group, of any of the ways in which XLA prints groups.

    {{0,1},{2,3}}; [2,4]<=[4,2]T(1,0): counted through the axes [4,2], transposed, cut into 2 rows;
    mesh['x'=2,'y'=4] {'y'}: along some axes of a mesh, where 'y':(2)2 is the part of size 2 of that
    axis after a part of size 2; none: all devices. Of a collective-permute, its first pair.
    """
    if pairs := re.search(r"source_target_pairs=\{\{([\d,]+)\}", attributes):
        return tuple(sorted({int(n) for n in pairs[1].split(",")}))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in listed[1].split(","))
    if counted := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        rows, axes = _ints(counted[1]), _ints(counted[2])
        order = _ints(counted[3]) if counted[3] else tuple(range(len(axes)))
        grid = np.arange(math.prod(axes)).reshape(axes).transpose(order).reshape(rows[0], -1)
        return tuple(int(n) for n in grid[0])
    if meshed := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(?(.*?)\)?)? ?\{([^}]*)\}", attributes
    ):
        return _mesh_group(meshed[1], meshed[2] or "", meshed[3], devices)
    return tuple(range(devices))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _mesh_group(sizes: str, order: str, axes: str, devices: int) -> tuple[int, ...]:
    names = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    ids = _device_order(order, devices).reshape(tuple(names.values()))
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    keep: list[list[int]] = []
    for name, size in names.items():
        along = [(int(a), int(b)) for n, a, b in parts if n == name and a]
        if any(n == name and not a for n, a, _ in parts):
            keep.append(list(range(size)))
        elif along:  # the index is (before, part, after); only parts vary
            keep.append(_parts(size, along))
        else:
            keep.append([0])
    return tuple(int(n) for n in ids[np.ix_(*keep)].reshape(-1))


def _parts(size: int, along: list[tuple[int, int]]) -> list[int]:
    steps = [range(0, size // before, size // before // part) for before, part in along]
    return sorted(sum(choice) for choice in itertools.product(*steps))


def _device_order(order: str, devices: int) -> np.ndarray:
    if counted := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        axes = _ints(counted[1])
        by = _ints(counted[2]) if counted[2] else tuple(range(len(axes)))
        return np.arange(math.prod(axes)).reshape(axes).transpose(by).reshape(-1)
    listed = re.findall(r"\d+", order)
    return np.array([int(n) for n in listed]) if listed else np.arange(devices)


def axes_of(group: tuple[int, ...], mesh: dict[str, int]) -> str:
    """The mesh axes along which the devices of a group differ."""
    places = np.unravel_index(np.array(group), tuple(mesh.values()))
    return ",".join(axis for axis, at in zip(mesh, places, strict=True) if len(set(at)) > 1)


def summary(found: list[Collective]) -> list[dict]:
    """Rows of a table: by kind, axes and pass, calls and bytes a step, most bytes first."""
    rows: dict[tuple[str, str, bool], dict] = {}
    for c in found:
        row = rows.setdefault(
            (c.kind, c.axes, c.backward),
            {
                "kind": c.kind,
                "axes": c.axes,
                "pass": "backward" if c.backward else "forward",
                "devices": len(c.group),
                "calls": 0,
                "bytes": 0,
            },
        )
        row["calls"] += c.times
        row["bytes"] += c.times * c.bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])
