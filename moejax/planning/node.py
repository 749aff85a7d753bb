"""The plan of a config on GPU nodes: by formula, because no compiler for them is at hand."""

from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, AxisType

from moejax.config import Config
from moejax.dispatch import ACTIVATIONS
from moejax.model.size import model_size
from moejax.planning.chips import Topology
from moejax.planning.collectives import Collective
from moejax.planning.memory import Memory, local_bytes
from moejax.planning.result import Counted, DoesNotFit, Plan, advice, vocabulary
from moejax.planning.roofline import gpu_places
from moejax.sharding import mesh_sizes
from moejax.training.program import lay_out

NOTES = (
    "analytic: nothing was compiled for this GPU; activations and temporaries are estimates from "
    "the layers' widths, collectives those that the sharding needs at least",
)


def plan_node(config: Config, topology: Topology, name: str = "") -> Plan:
    """State from the shardings, all else by formula.

    Raises:
      ValueError: the mesh does not fit the GPUs, the batch or a weight.
      DoesNotFit: more memory than a GPU has.
    """
    mesh = mesh_sizes(config.mesh, topology.chips)
    laid = abstract_layout(config, mesh)
    available = topology.chip.hbm
    used = estimated_memory(config, mesh, laid.state)
    if used.total > available:
        how = advice(config, mesh, used.parameters + used.optimizer, available)
        raise DoesNotFit(used.total, available, f"(by formula) {how}")
    tokens = config.data.batch * config.data.sequence
    flops = tokens * model_size(config, vocabulary(config)).flops / topology.chips
    flops *= 4 / 3 if _again(config) else 1
    # The optimizer reads and writes its moments and the parameters; each pass reads the weights.
    moved = 2.0 * (used.parameters + used.optimizer) + 3.0 * used.activations
    moved += 3.0 * config.train.accumulation * used.parameters
    counted = Counted(
        places=gpu_places(topology, topology.chips),
        memory=used,
        flops=flops,
        worst_flops=flops,
        hbm_bytes=moved,
        collectives=needed_collectives(config, mesh, laid.state),
        tensors=[],
        notes=NOTES,
        compile_seconds=None,
    )
    return Plan.of(config, topology, name, mesh, counted)


def abstract_layout(config: Config, mesh: dict[str, int]) -> Any:
    """The state's shapes and shardings on a mesh without devices."""
    axis_types = (AxisType.Auto,) * len(mesh)
    where = AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=axis_types)
    return lay_out(config, vocabulary(config), where)


def estimated_memory(config: Config, mesh: dict[str, int], state: Any) -> Memory:
    """What a device holds at the peak: all gradients, the microbatch's activations, one layer's
    intermediate values and the logits."""
    parameters = local_bytes(state.params)
    layer = _layer_bytes(config, mesh)
    tokens = _tokens(config, mesh)
    inputs = config.model.dim * _item(config)
    if config.model.remat == "routing":  # logits, and of each choice its expert and its places
        inputs += 4 * config.moe.experts + int(12 * config.choices)
    kept = config.model.layers * (layer if config.model.remat == "none" else tokens * inputs)
    logits = 2 * 4 * tokens * vocabulary(config) // mesh["tensor"]
    return Memory(
        parameters=parameters,
        optimizer=local_bytes(state.opt_state),
        batch=tokens * 24,
        activations=kept,
        gradients=parameters,
        temporaries=max(logits, 2 * layer),
        code=0,
    )


def needed_collectives(config: Config, mesh: dict[str, int], state: Any) -> list[Collective]:
    """Of one step: weights gathered over fsdp, gradients added up, tokens exchanged."""
    item, parts = _item(config), config.train.accumulation
    again = 1 if _again(config) else 0
    # A device's share without fsdp, in the compute dtype.
    gathered = local_bytes(state.params) // 4 * item * mesh["fsdp"]
    found = []

    def add(kind: str, axis: str, size: float, times: int, backward: bool) -> None:
        if mesh[axis] > 1 and times:
            group = _group(mesh, axis)
            found.append(Collective(kind, axis, group, int(size), times, backward, ""))

    add("all-gather", "fsdp", gathered, parts, False)
    add("all-gather", "fsdp", gathered, parts * (1 + again), True)
    add("reduce-scatter", "fsdp", gathered, parts, True)
    add("all-reduce", "data", local_bytes(state.params), 1, True)
    if config.moe_layers:
        sent = _tokens(config, mesh) * config.choices * config.model.dim * item
        calls = 2 * parts * config.moe_layers
        add("all-to-all", "expert", sent, calls, False)
        add("all-to-all", "expert", sent, calls * (1 + again), True)
    each = _tokens(config, mesh) * config.model.dim * item
    calls = 2 * parts * config.model.layers
    add("all-reduce", "tensor", each, calls, False)
    add("all-reduce", "tensor", each, calls * (1 + again), True)
    return found


def _group(mesh: dict[str, int], axis: str) -> tuple[int, ...]:
    ids = np.arange(int(np.prod(list(mesh.values())))).reshape(tuple(mesh.values()))
    index = tuple(slice(None) if name == axis else 0 for name in mesh)
    return tuple(int(i) for i in ids[index])


def _layer_bytes(config: Config, mesh: dict[str, int]) -> int:
    """What one layer keeps for its backward pass: attention's inputs, scores and outputs, and what
    the feed-forward network or K experts of a token read and make."""
    model, moe = config.model, config.moe
    tokens, item, tensor = _tokens(config, mesh), _item(config), mesh["tensor"]
    heads = (2 * model.heads + 2 * model.key_value_heads) * model.width
    heads += 2 * model.heads * model.rope_dim
    scores = 0  # of a block of queries they are gone before the next
    if not model.query_block:
        scores = model.heads * config.data.sequence * (4 + item)
    attention = 4 * model.dim * item + (heads * item + scores) // tensor
    inner = 3 if ACTIVATIONS[model.activation][1] else 2
    if config.moe_layers:
        width, visits = moe.ffn or model.ffn, config.computed + moe.shared
    else:
        width, visits = model.ffn, 1.0
    feed_forward = visits * (2 * model.dim + inner * width // tensor) * item
    return int(tokens * (attention + feed_forward))


def _tokens(config: Config, mesh: dict[str, int]) -> int:
    """Of one microbatch on one device."""
    rows = config.data.batch // config.train.accumulation
    return rows * config.data.sequence // (mesh["data"] * mesh["fsdp"] * mesh["expert"])


def _item(config: Config) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def _again(config: Config) -> bool:
    return config.model.remat != "none" or config.train.accumulation > 1
