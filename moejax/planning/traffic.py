"""Bytes that a compiled program moves between HBM and the chip, loops multiplied out.

Every instruction outside of fusions reads its operands and writes its results once. Slices of a
stack, read or written in place, count as the slice. Arrays that the compiler keeps on the chip
(memory space 1) are free; what brings them there or back is a copy, counted once.
"""

from moejax.planning.hlo import Computation, Instruction, Module
from moejax.planning.loops import Runs
from moejax.planning.memory import fused

_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "iota", "optimization-barrier"),
)
_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_bytes(module: Module, runs: Runs) -> float:
    """Of one step on one device."""
    inner = fused(module)
    total = 0.0
    for name, times in runs.times.items():
        if name not in inner:
            computation = module.computations[name]
            total += times * sum(_moved(module, computation, i) for i in computation.values())
    return total


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-start"):
        return 0
    if opcode.startswith(("async-", "call-")):  # what they run is counted where it stands
        return 0
    if opcode.endswith("-done") or opcode in _SLICES:
        return sum(shape.bytes for shape in instruction.shapes)
    if opcode == "dynamic-update-slice":
        return _size(computation, instruction.operands[1])
    if opcode == "fusion":
        return _fusion(module, computation, instruction)
    read = sum(_size(computation, operand) for operand in instruction.operands)
    return read + _written(instruction)


def _written(instruction: Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes if shape.hbm)


def _size(computation: Computation, operand: str) -> int:
    given = computation.get(operand)
    return _written(given) if given is not None else 0


def _fusion(module: Module, computation: Computation, fusion: Instruction) -> int:
    body = module.computations[fusion.called()[0]]
    users: dict[str, list[Instruction]] = {}
    for instruction in body.values():
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)
    total = 0
    for parameter in (i for i in body.values() if i.opcode == "parameter"):
        given = computation.get(fusion.operands[int(parameter.argument)])
        if given is not None and any(shape.hbm for shape in given.shapes):
            total += _read(parameter, users)
    root = next(instruction for instruction in body.values() if instruction.root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for shape, result in zip(fusion.shapes, results, strict=False):
        if shape.hbm:
            total += _result(body, result, shape.bytes)
    return total


def _read(parameter: Instruction, users: dict[str, list[Instruction]]) -> int:
    """What a fusion reads of one of its parameters."""
    total, waiting = 0, [parameter.name]
    while waiting:
        name = waiting.pop()
        for user in users.get(name, []):
            if user.opcode == "bitcast":
                waiting.append(user.name)
            elif user.opcode in _SLICES:
                total += sum(shape.bytes for shape in user.shapes)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue  # in place: what is not updated stays where it is
            else:
                return sum(shape.bytes for shape in parameter.shapes)
    return total


def _result(body: Computation, result: Instruction, whole: int) -> int:
    while result.opcode == "bitcast":
        result = body[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return sum(shape.bytes for shape in body[result.operands[1]].shapes)
    return whole
