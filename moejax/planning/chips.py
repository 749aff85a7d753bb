"""What each chip can do, and the names of topologies.

TPUs: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" (system
architecture: peak compute in bf16, HBM capacity and bandwidth, bidirectional inter-chip bandwidth,
all per chip); for v4's links Jouppi et al. 2023, 2304.01433 (six links of 50 GB/s each way).
GPUs: NVIDIA's data sheets of H100 SXM and H200 SXM (dense bf16, NVLink 900 GB/s both ways together)
and of DGX H100/H200 (one 400 Gb/s adapter a GPU between nodes).
"""

import re
from typing import NamedTuple

from moejax.names import did_you_mean


class Chip(NamedTuple):
    """One kind of accelerator; bytes, FLOP/s, bytes/s, each of one chip.

    Attributes:
      flops: dense peak in bfloat16.
      ici: links inside the torus or the node, both directions together.
      axes: dimensions of the torus; 0 = a node of GPUs behind a switch.
      between: one way, to chips outside of the node; 0 where there is no node.
    """

    name: str
    hbm: float
    flops: float
    hbm_bandwidth: float
    ici: float
    axes: int
    between: float = 0.0

    @property
    def axis_bandwidth(self) -> float:
        """What a chip sends along one axis of the torus, both ways round; of a GPU, to all."""
        return self.ici / (2 * max(1, self.axes))


GIB = 2.0**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1200e9, 600e9, 3),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 400e9, 2),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 1200e9, 3),
        Chip("v6e", 32 * GIB, 918e12, 1640e9, 800e9, 2),
        Chip("tpu7x", 192 * GIB, 2307e12, 7380e9, 1200e9, 3),
        Chip("h100", 80e9, 989e12, 3350e9, 900e9, 0, 50e9),
        Chip("h200", 141e9, 989e12, 4800e9, 900e9, 0, 50e9),
    )
}
NODE = 8  # GPUs behind one switch


class Topology(NamedTuple):
    """Chips and how they lie: v5p:4x4x8 = a torus of 128 TPUs; h100:2x8 = 2 nodes of 8 GPUs."""

    name: str
    chip: Chip
    sides: tuple[int, ...]

    @property
    def chips(self) -> int:
        count = 1
        for side in self.sides:
            count *= side
        return count

    @property
    def gpu(self) -> bool:
        return self.chip.axes == 0


def parse_topology(name: str) -> Topology:
    """The topology of a name.

    Raises:
      ValueError: an unknown chip, or sides that are not those of its torus.
    """
    kind, _, sides = name.lower().partition(":")
    if kind not in CHIPS:
        raise ValueError(
            f"unknown topology {name!r}{did_you_mean(kind, CHIPS)} (as in v5p:4x4x8, v5e:4x8, "
            "h100:2x8)"
        )
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
        raise ValueError(f"topology {name!r}: after ':' come sides, as in 4x8; got {sides!r}")
    numbers = tuple(int(side) for side in sides.split("x"))
    if chip.axes and len(numbers) != chip.axes:
        raise ValueError(
            f"topology {name!r} has {len(numbers)} sides, a torus of {kind} has {chip.axes}"
        )
    if not chip.axes and (len(numbers) > 2 or numbers[-1] > NODE):
        raise ValueError(
            f"topology {name!r}: GPUs are NODESxGPUS with at most {NODE} GPUs a node, got "
            f"{'x'.join(map(str, numbers))}"
        )
    return Topology(f"{kind}:{sides}", chip, numbers)
