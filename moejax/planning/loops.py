"""How often each computation of a program runs: trip counts of its loops, multiplied inwards."""

import math
import re
from typing import NamedTuple

from moejax.planning.hlo import Computation, Instruction, Module


class Runs(NamedTuple):
    """How often one step runs things.

    Attributes:
      times: computation -> how often. All branches of a conditional count as taken.
      trips: while instruction's name -> trip count.
      unknown: loops whose trip count could not be read; counted as 1.
    """

    times: dict[str, int]
    trips: dict[str, int]
    unknown: tuple[str, ...]


def runs(module: Module) -> Runs:
    """Walks from the entry through every call."""
    times: dict[str, int] = {module.entry: 1}
    trips: dict[str, int] = {}
    unknown: list[str] = []
    for name in _callers_first(module):
        for instruction in module.computations[name].values():
            called = instruction.called()
            if not called:
                continue
            count = 1
            if instruction.opcode == "while":
                found = trip_count(module, name, instruction)
                if found is None:
                    unknown.append(instruction.name)
                count = 1 if found is None else found
                trips[instruction.name] = count
            for callee in called:
                times[callee] = times.get(callee, 0) + times[name] * count
    return Runs(times, trips, tuple(unknown))


def _callers_first(module: Module) -> list[str]:
    """The computations that the entry reaches, each after all that call it."""
    done: dict[str, None] = {}
    stack: list[tuple[str, bool]] = [(module.entry, False)]
    while stack:
        name, finished = stack.pop()
        if finished:
            done[name] = None
        elif name not in done:
            stack.append((name, True))
            for instruction in module.computations[name].values():
                stack += [(callee, False) for callee in instruction.called() if callee not in done]
    return list(reversed(done))


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """Of a while that counts a tuple element from a constant by a constant up to one; else None."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = _named(module, loop, "condition")
    test = _root(condition)
    direction = re.search(r"direction=(LT|LE)", test.attributes)
    if test.opcode != "compare" or not direction:
        return None
    counter, limit = (condition[name] for name in test.operands)
    if counter.opcode != "get-tuple-element":
        return None
    index = counter.number("index")
    before = module.computations[computation]
    start = _initial(before, loop, index)
    end = _constant(condition, limit)
    if end is None and limit.opcode == "get-tuple-element":
        end = _initial(before, loop, limit.number("index"))
    if end is None or start is None:
        return None
    step = _step(_named(module, loop, "body"), index)
    return max(0, math.ceil((end - start + (direction[1] == "LE")) / step))


def _named(module: Module, loop: Instruction, attribute: str) -> Computation:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", loop.attributes)
    return module.computations[found[1]] if found else {}


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
        instruction = computation[instruction.operands[0]]
    literal = re.fullmatch(r"-?\d+", instruction.argument)
    return int(literal[0]) if instruction.opcode == "constant" and literal else None


def _initial(before: Computation, loop: Instruction, index: int) -> int | None:
    """The value of a tuple element before the loop, where it is a constant."""
    carried = before[loop.operands[0]]
    if carried.opcode != "tuple":
        return None
    return _constant(before, before[carried.operands[index]])


def _step(body: Computation, index: int) -> int:
    """What the body adds to the counter; 1 where it does not show."""
    result = _root(body)
    if result.opcode != "tuple":
        return 1
    added = body[result.operands[index]]
    if added.opcode != "add":
        return 1
    values = [_constant(body, body[name]) for name in added.operands]
    return next((value for value in values if value), 1)
