"""A step's time at best: operations, bytes and collectives over what the chip can do.

Assumptions, printed with every plan:
"""

from typing import NamedTuple

from moejax.planning.chips import NODE, Topology
from moejax.planning.collectives import Collective

ASSUMPTIONS = (
    "matrix products at the bf16 peak, memory at its full bandwidth, links at theirs: an upper "
    "bound on speed, no latency",
    "experts evenly loaded: grouped products and ragged exchanges count the rows that then hold "
    "tokens",
    "sum: no collective overlaps with compute; overlap: all of them do",
    "torus with wrap-around; a ring of n along one axis gathers V bytes in V (n-1)/n / W, reduces "
    "in twice that, and exchanges B bytes a chip all to all in B n / (4 W)",
    "W = what a chip sends along one torus axis, both ways round; a group that spans several axes "
    "uses all of them; between GPU nodes one adapter a GPU",
)


class Estimate(NamedTuple):
    """Seconds of one step on the busiest resource, and what follows. MFU counts the model's
    analytic operations, not those of recomputing."""

    compute: float
    hbm: float
    collectives: float
    tokens: int
    model_flops: float
    peak: float

    @property
    def seconds_sum(self) -> float:
        return max(self.compute, self.hbm) + self.collectives

    @property
    def seconds_overlap(self) -> float:
        return max(self.compute, self.hbm, self.collectives)

    def rates(self, seconds: float) -> tuple[float, float]:
        """(tokens a second, MFU) at a step time."""
        return self.tokens / seconds, self.model_flops / seconds / self.peak


def collective_seconds(
    found: list[Collective], topology: Topology, places: list[tuple[int, ...]]
) -> float:
    """All collectives of a step one after the other. `places`: coordinates of each device's chip;
    of GPUs (node, number)."""
    share = topology.chips / len(places)  # two devices may share a chip's links
    return sum(c.times * _seconds(c, topology, places) for c in found) / share


def _seconds(c: Collective, topology: Topology, places: list[tuple[int, ...]]) -> float:
    sides = [len({places[i][axis] for i in c.group}) for axis in range(len(places[0]))]
    size, spanned = len(c.group), [side for side in sides if side > 1]
    exchange = c.kind in ("all-to-all", "ragged-all-to-all")
    twice = 2.0 if c.kind == "all-reduce" else 1.0
    if topology.gpu:
        far = sides[0] > 1
        bandwidth = topology.chip.between if far else topology.chip.axis_bandwidth
        return twice * c.bytes * (size - 1) / size / bandwidth
    width = topology.chip.axis_bandwidth
    if not spanned:  # devices of one chip
        return 0.0
    if c.kind == "collective-permute":
        return c.bytes / (width / 2)
    if exchange:
        return c.bytes * max(spanned) / (4 * width)
    return twice * c.bytes * (size - 1) / size / (width * len(spanned))


def gpu_places(topology: Topology, devices: int) -> list[tuple[int, ...]]:
    """(node, number in it) of each device, nodes filled one after the other."""
    inside = min(NODE, topology.sides[-1])
    return [divmod(i, inside) for i in range(devices)]
