"""A training step lowered for 4,096 devices that nobody has: nothing compiles or is allocated."""

import dataclasses
import math

import jax
from jax.stages import Lowered

from moejax.config import Config, MeshConfig
from moejax.planning.node import abstract_layout
from moejax.planning.result import vocabulary
from moejax.training.program import Laid, lower_train_step

DEVICES = 4096


def on_pod(config: Config, mesh: dict[str, int], batch: int) -> Config:
    assert math.prod(mesh.values()) == DEVICES
    data = dataclasses.replace(config.data, batch=batch)
    return dataclasses.replace(config, mesh=MeshConfig(**mesh), data=data)


def laid(config: Config) -> Laid:
    """The config's state on its mesh."""
    return abstract_layout(config, dataclasses.asdict(config.mesh))


def lowered(config: Config) -> tuple[Laid, Lowered]:
    """The config's state and step on its mesh."""
    where = laid(config)
    step = lower_train_step(config, vocabulary(config), where)
    assert f"num_partitions = {DEVICES} " in step.as_text()[:2000]
    return where, step


def assert_experts_are_cut(laid: Laid) -> int:
    """No device holds more of the experts' weights, and of what the optimizer keeps for each, than
    its share by the axes expert, fsdp and tensor; returns how many arrays that is about."""
    parts = math.prod(laid.mesh.shape[axis] for axis in ("expert", "fsdp", "tensor"))
    weights = {
        leaf.shape
        for path, leaf in jax.tree.leaves_with_path(laid.state.params)
        if path[-1].key.endswith(("_EDF", "_EFD"))
    }
    # By shape: Adafactor's rows and columns are named like their weight.
    found = [leaf for leaf in jax.tree.leaves(laid.state) if leaf.shape in weights]
    for leaf in found:
        here = math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert here * parts == math.prod(leaf.shape), leaf
    return len(found)
