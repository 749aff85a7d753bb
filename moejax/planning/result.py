"""What a plan says: one record for the table, the JSON and the page."""

import dataclasses
import importlib.metadata
from typing import Any, NamedTuple

from moejax.config import Config
from moejax.data.config import bpe_size
from moejax.model.size import Size, model_size
from moejax.planning.chips import Topology
from moejax.planning.collectives import Collective, summary
from moejax.planning.memory import Memory, Tensor
from moejax.planning.roofline import ASSUMPTIONS, Estimate, collective_seconds


class Counted(NamedTuple):
    """What was read off a compiled step, or estimated of one; of one device.

    Attributes:
      places: of each device of the mesh; see `collective_seconds`.
      memory: bytes.
      flops: of a step, experts evenly loaded.
      worst_flops: the same where every row of the experts' buffers holds a token.
      hbm_bytes: moved in a step.
      collectives: of a step.
      tensors: the largest.
      notes: what a reader must know.
      compile_seconds: None = by formula, nothing was compiled.
    """

    places: list[tuple[int, ...]]
    memory: Memory
    flops: float
    worst_flops: float
    hbm_bytes: float
    collectives: list[Collective]
    tensors: list[Tensor]
    notes: tuple[str, ...]
    compile_seconds: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one topology.

    Attributes:
      name: of the config.
      mesh: axis -> size. devices: of the mesh; a chip may be two.
      hbm: bytes of memory of one device.
      compiled: False = analytic, nothing was compiled.
      memory: bytes on a device.
      flops: of a step on a device, experts evenly loaded: the compiled program's, or analytic.
      worst_flops: the same where every row of the experts' buffers holds a token.
      model_flops: analytic, of a step on a device: see `Size.flops`.
      collectives: rows by kind, axes and pass.
      tensors: the largest.
      notes: what a reader must know.
    """

    name: str
    topology: Topology
    mesh: dict[str, int]
    devices: int
    hbm: float
    compiled: bool
    size: Size
    memory: Memory
    flops: float
    worst_flops: float
    model_flops: float
    hbm_bytes: float
    collectives: list[dict]
    tensors: list[Tensor]
    estimate: Estimate
    compile_seconds: float
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, config: Config, topology: Topology, name: str, mesh: dict[str, int], counted: Counted
    ) -> "Plan":
        """The plan that follows from what was counted."""
        chip, devices = topology.chip, len(counted.places)
        share = topology.chips / devices  # of a chip, that a device is
        size = model_size(config, vocabulary(config))
        tokens = config.data.batch * config.data.sequence
        estimate = Estimate(
            compute=counted.flops / (chip.flops * share),
            hbm=counted.hbm_bytes / (chip.hbm_bandwidth * share),
            collectives=collective_seconds(counted.collectives, topology, counted.places),
            tokens=tokens,
            model_flops=tokens * size.flops,
            peak=chip.flops * topology.chips,
        )
        return cls(
            name=name,
            topology=topology,
            mesh=mesh,
            devices=devices,
            hbm=chip.hbm * share,
            compiled=counted.compile_seconds is not None,
            size=size,
            memory=counted.memory,
            flops=counted.flops,
            worst_flops=counted.worst_flops,
            model_flops=estimate.model_flops / devices,
            hbm_bytes=counted.hbm_bytes,
            collectives=summary(counted.collectives),
            tensors=counted.tensors,
            estimate=estimate,
            compile_seconds=counted.compile_seconds or 0.0,
            notes=counted.notes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: bytes, FLOPs and seconds."""
        e = self.estimate
        steps = {"sum": e.seconds_sum, "overlap": e.seconds_overlap}
        rates = {how: e.rates(seconds) for how, seconds in steps.items()}
        return {
            "config": self.name,
            "versions": versions(),
            "topology": self.topology.name,
            "chip": self.topology.chip._asdict(),
            "devices": self.devices,
            "mesh": self.mesh,
            "compiled": self.compiled,
            "compile_seconds": self.compile_seconds,
            "params": {"total": self.size.total, "active": self.size.active},
            "tokens": e.tokens,
            "memory": {**self.memory._asdict(), "total": self.memory.total, "hbm": self.hbm},
            "flops": {
                "program": self.flops,
                "program_worst_load": self.worst_flops,
                "model": self.model_flops,
                "ratio": self.flops / self.model_flops,
            },
            "hbm_bytes": self.hbm_bytes,
            "collectives": self.collectives,
            "largest_tensors": [tensor._asdict() for tensor in self.tensors],
            "seconds": {
                "compute": e.compute,
                "hbm": e.hbm,
                "collectives": e.collectives,
                **{f"step_{how}": seconds for how, seconds in steps.items()},
            },
            "tokens_per_second": {how: rate[0] for how, rate in rates.items()},
            "mfu": {how: rate[1] for how, rate in rates.items()},
            "assumptions": list(ASSUMPTIONS),
            "notes": list(self.notes),
        }


class DoesNotFit(Exception):
    """The step needs more memory than a device has. `needed`, `available`: bytes."""

    def __init__(self, needed: float, available: float, advice: str) -> None:
        super().__init__(
            f"does not fit: {needed / 2**30:.2f} GiB needed of {available / 2**30:.2f} GiB a "
            f"device; {advice}"
        )
        self.needed, self.available = needed, available


def versions() -> dict[str, str]:
    """Of what makes a plan; libtpu has the TPU compiler."""
    installed = {package.name for package in importlib.metadata.distributions()}
    known = [name for name in ("jax", "libtpu") if name in installed]
    return {name: importlib.metadata.version(name) for name in known}


def vocabulary(config: Config) -> int:
    """Ids of the config's tokenizer, without opening any text."""
    return bpe_size(config.data.tokenizer) or 256


def advice(config: Config, mesh: dict[str, int], state: float, available: float) -> str:
    """What to change first so that a config fits; `state`: bytes of parameters and optimizer."""
    rows = config.data.batch // config.train.accumulation
    parts = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    if state > available / 2:
        which = "mesh.fsdp" if mesh["data"] > 1 else "the number of chips"
        return (
            f"parameters and optimizer alone take {state / 2**30:.2f} GiB: raise {which} "
            f"(mesh {mesh}), or optimizer.name=adafactor"
        )
    if config.model.remat == "none":
        return "set model.remat=full"
    if rows > parts:
        return (
            f"raise train.accumulation={config.train.accumulation}, up to "
            f"{config.train.accumulation * rows // parts}"
        )
    return f"raise mesh.fsdp or mesh.tensor (mesh {mesh}), or lower data.sequence"
