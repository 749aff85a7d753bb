"""How the batch is cut over the devices of a mesh, as code inside `shard_map` sees it."""

import dataclasses
from typing import Any

import jax

BATCH_AXES = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class Shards:
    """The pieces of the batch. The default: one device has all of it, and no collective is needed.

    Attributes:
      axes: the mesh axes that cut the batch, () outside `shard_map`.
      count: how many pieces there are.
    """

    axes: tuple[str, ...] = ()
    count: int = 1

    def index(self) -> jax.Array | int:
        """Which piece is here; pieces follow each other as the tokens of the batch do."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def whole(self, a: Any) -> Any:
        """Inside `shard_map`: arrays cut by tokens, from all devices behind each other."""
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axes, tiled=True), a)

    def stacked(self, a: jax.Array) -> jax.Array:
        """Inside `shard_map`: this array of every piece, [...] to [pieces, ...]."""
        return jax.lax.all_gather(a, self.axes)

    def total(self, sums: Any) -> Any:
        """Sums over this piece to sums over the batch: one all-reduce for all of them."""
        return jax.lax.psum(sums, self.axes) if self.axes else sums


ALONE = Shards()


def mesh_shards() -> Shards:
    """Of the mesh that is set (`jax.set_mesh`), where it is one of ours with several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or not all(axis in mesh.shape for axis in (*BATCH_AXES, "tensor")):
        return ALONE
    return Shards(BATCH_AXES, mesh.size // mesh.shape["tensor"])
