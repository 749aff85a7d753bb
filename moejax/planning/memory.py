"""Where a chip's memory goes: state, activations, gradients, temporaries; the largest tensors."""

import math
import re
from typing import Any, NamedTuple

import jax

from moejax.planning.hlo import Instruction, Module
from moejax.planning.loops import Runs

_NO_BUFFER = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call")


class Memory(NamedTuple):
    """Bytes on one device, as the compiler assigned them.

    Attributes:
      parameters, optimizer, batch: arguments of the step; the batch with all other state.
      activations: what the forward pass keeps, layer by layer, for the backward pass.
      gradients: of the layers' parameters.
      temporaries: everything else that lives during the step.
      code: the program.
    """

    parameters: int
    optimizer: int
    batch: int
    activations: int
    gradients: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return sum(self)


class Tensor(NamedTuple):
    """One array that the program keeps in HBM."""

    shape: str
    bytes: int
    op_name: str
    places: int = 1


def local_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def memory(stats: Any, state: Any, module: Module, runs: Runs) -> Memory:
    """`stats`: `compiled.memory_analysis()`; `state`: the abstract `TrainState`."""
    parameters, optimizer = local_bytes(state.params), local_bytes(state.opt_state)
    activations, gradients = stacked_bytes(module, runs)
    outputs = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    temporaries = stats.temp_size_in_bytes + outputs
    activations = min(activations, temporaries)
    gradients = min(gradients, temporaries - activations)
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        # With what the tiles of parameters pad.
        batch=max(0, stats.argument_size_in_bytes - parameters - optimizer),
        activations=activations,
        gradients=gradients,
        temporaries=temporaries - activations - gradients,
        code=stats.generated_code_size_in_bytes,
    )


def stacked_bytes(module: Module, runs: Runs) -> tuple[int, int]:
    """What loops over layers write slice by slice: (by forward loops, by backward ones).

    An element of a loop's tuple is such a stack where its first axis is as long as the loop and the
    body updates a slice of it.
    """
    forward = backward = 0
    for name in runs.times:
        for loop in module.computations[name].values():
            if loop.opcode != "while" or runs.trips.get(loop.name, 1) < 2:
                continue
            written = sum(
                shape.bytes
                for i, shape in enumerate(loop.shapes)
                if shape.hbm
                and len(shape.dims) > 1
                and shape.dims[0] == runs.trips[loop.name]
                and _written_in_slices(module, loop, i)
            )
            if is_backward(loop.op_name):
                backward += written
            elif "jvp(" in loop.op_name:  # else a loop of the compiler's, as over weights it casts
                forward += written
    return forward, backward


def is_backward(op_name: str) -> bool:
    """Of a part of the program; recomputing a part of the forward pass counts as forward."""
    return "transpose(" in op_name.rpartition("rematted_computation")[2]


def _written_in_slices(module: Module, loop: Instruction, index: int) -> bool:
    """Whether the body updates a slice of this element in place."""
    body = module.computations[loop.called()[-1]]
    result = next(instruction for instruction in body.values() if instruction.root)
    if result.opcode != "tuple":
        return False
    given, part = body[result.operands[index]], 0
    while True:
        if given.opcode in ("bitcast", "copy", "copy-done", "copy-start"):
            given = body[given.operands[0]]
        elif given.opcode == "get-tuple-element" and body[given.operands[0]].opcode == "fusion":
            given, part = body[given.operands[0]], given.number("index")
        elif given.opcode == "fusion":
            body = module.computations[given.called()[0]]
            given = next(instruction for instruction in body.values() if instruction.root)
            given = body[given.operands[part]] if given.opcode == "tuple" else given
        else:
            return given.opcode == "dynamic-update-slice"


def largest_tensors(module: Module, runs: Runs, count: int = 10) -> list[Tensor]:
    """The largest arrays of HBM that instructions outside of fusions make, one of each shape; with
    its shape, how many places of the program make one."""
    inner = fused(module)
    found: dict[str, list[Tensor]] = {}
    for name in runs.times:
        if name in inner:
            continue
        for instruction in module.computations[name].values():
            if instruction.opcode in _NO_BUFFER and not (
                instruction.opcode == "parameter" and name == module.entry
            ):
                continue
            for shape in instruction.shapes:
                place = short(instruction.op_name) or instruction.opcode
                if shape.hbm:
                    found.setdefault(str(shape), []).append(Tensor(str(shape), shape.bytes, place))
    largest = sorted(found.values(), key=lambda alike: -alike[0].bytes)[:count]
    # Where it comes from: the longest name, because copies and broadcasts have short ones.
    named = [max(alike, key=lambda tensor: len(tensor.op_name)) for alike in largest]
    return [t._replace(places=len(alike)) for t, alike in zip(named, largest, strict=True)]


def fused(module: Module) -> set[str]:
    """Computations inside fusions: what they make has no buffer."""
    return {
        callee
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "fusion"
        for callee in instruction.called()
    }


def short(op_name: str) -> str:
    """An op_name without the jit, loop and call wrappers that all of them share."""
    kept = re.sub(
        r"\b(jit\(\w+\)|closed_call|eval_jaxpr|while|body|cond|branch_\d_fun|checkpoint|jvp\(\))/",
        "",
        op_name,
    )
    kept = kept.replace("rematted_computation/", "again/").replace("transpose(jvp())", "backward")
    return re.sub(r"\[\\?'?(\w+)\\?'?\]", r"/\1", kept)
