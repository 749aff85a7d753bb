"""Which change makes a config fit: remat, then accumulation, then other meshes."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moejax.config import Config
from moejax.planning.chips import Topology
from moejax.planning.node import abstract_layout, estimated_memory, plan_node
from moejax.planning.pod import plan_pod
from moejax.planning.result import DoesNotFit, Plan
from moejax.sharding import mesh_sizes


class Try(NamedTuple):
    """One config that was tried.

    Attributes:
      change: flags that make it of the given config; '' = as given.
      needed: bytes a device; None where the config is not possible.
      outcome: 'fits', or why not.
    """

    change: str
    needed: float | None
    outcome: str


def plan(config: Config, topology: Topology, name: str = "") -> Plan:
    """Compiled on a TPU topology, by formula on GPUs."""
    return (plan_node if topology.gpu else plan_pod)(config, topology, name)


def search(
    config: Config,
    topology: Topology,
    name: str,
    devices: int,
    most: int,
    said: Callable[[Try], None],
) -> tuple[Plan | None, list[Try]]:
    """The first of `most` candidates that fits, and all that were tried; `said` hears each."""
    tries: list[Try] = []
    for candidate in candidates(config, devices):
        if len(tries) == most:
            break
        change = changes(config, candidate)
        try:
            found = plan(candidate, topology, name)
        except DoesNotFit as error:
            there = f"does not fit in {error.available / 2**30:.2f} GiB"
            tries.append(Try(change, error.needed, there))
        except ValueError as error:
            tries.append(Try(change, None, str(error)))
        else:
            tries.append(Try(change, found.memory.total, "fits"))
            said(tries[-1])
            return found, tries
        said(tries[-1])
    return None, tries


def candidates(config: Config, devices: int) -> Iterator[Config]:
    """As given, with remat, with accumulation; then the meshes that need least by formula."""
    yield config
    remat = _with(config, "model", remat="full")
    if config.model.remat == "none":  # a little more memory than full, and routing once
        yield _with(config, "model", remat="routing")
    if remat != config:
        yield remat
    mesh = mesh_sizes(config.mesh, devices)
    yield from accumulated(remat, mesh)
    others = [m for m in meshes(config, devices) if m != mesh]
    ranked = [(estimate, m) for m in others if (estimate := _estimate(remat, m)) is not None]
    for _, other in sorted(ranked, key=lambda pair: pair[0]):
        yield _with(remat, "mesh", **other)


def accumulated(config: Config, mesh: dict[str, int]) -> Iterator[Config]:
    """More microbatches, doubled up to one row for each part of the batch."""
    parts = config.train.accumulation * 2
    batch, least = config.data.batch, mesh["data"] * mesh["fsdp"] * mesh["expert"]
    while batch % parts == 0 and (batch // parts) % least == 0:
        yield _with(config, "train", accumulation=parts)
        parts *= 2


def meshes(config: Config, devices: int) -> Iterator[dict[str, int]]:
    """Every way to lay data, fsdp and expert over the devices, tensor as it is."""
    tensor = max(1, config.mesh.tensor)
    rest = devices // tensor
    for expert in (n for n in range(1, rest + 1) if rest % n == 0):
        if expert > 1 and (not config.moe.experts or config.moe.experts % expert):
            continue
        for fsdp in (n for n in range(1, rest // expert + 1) if rest // expert % n == 0):
            yield {
                "data": rest // expert // fsdp,
                "fsdp": fsdp,
                "expert": expert,
                "tensor": tensor,
            }


def changes(before: Config, after: Config) -> str:
    """What differs, as flags."""
    flags = []
    for section in ("model", "train", "mesh"):
        old, new = getattr(before, section), getattr(after, section)
        for field in dataclasses.fields(new):
            value = getattr(new, field.name)
            if value != getattr(old, field.name):
                flags.append(f"--config.{section}.{field.name}={value}")
    return " ".join(flags)


def _estimate(config: Config, mesh: dict[str, int]) -> float | None:
    """Bytes a device by formula; None where the mesh divides a dimension or the batch unevenly."""
    try:
        laid = abstract_layout(_with(config, "mesh", **mesh), mesh)
    except ValueError:
        return None
    return estimated_memory(config, mesh, laid.state).total


def _with(config: Config, section: str, **values: Any) -> Config:
    changed: dict[str, Any] = {section: dataclasses.replace(getattr(config, section), **values)}
    return dataclasses.replace(config, **changed)
