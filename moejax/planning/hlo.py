"""A compiled program as text (`compiled.as_text()`), read into computations and instructions.

What a compiler's own cost analysis gives counts the body of a loop once. Here every computation
knows how often one call of the program runs it.
"""

import functools
import math
import re
from typing import NamedTuple

# Bits of the element types that differ from the digits of their names.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
# call-start: what TPU7x gives to another of its cores.
_CALLS = ("fusion", "call", "call-start", "while", "conditional")
_LISTED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


class Shape(NamedTuple):
    """One array of a program: element type, dimensions, and whether it lies in HBM."""

    dtype: str
    dims: tuple[int, ...]
    hbm: bool = True

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 8)
        return math.ceil(math.prod(self.dims) * bits / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """`%name = shapes opcode(operands), attributes`; more than one shape where it gives a tuple."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    argument: str = ""  # what stands in the parentheses: a constant's value, a parameter's number

    @property
    def op_name(self) -> str:
        """Where in the source program it comes from; '' where the compiler made it up."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def number(self, attribute: str, default: int = 0) -> int:
        found = re.search(rf"\b{attribute}=(\d+)", self.attributes)
        return int(found[1]) if found else default

    def called(self) -> list[str]:
        """The computations that it runs, without a loop's condition and a reduction's operator."""
        if "=" not in self.attributes:
            return []
        head = self.attributes.split("metadata={", 1)[0]
        if self.opcode in _CALLS or "async" in self.opcode:
            listed = [re.findall(r"%([\w.\-]+)", group) for group in _LISTED.findall(head)]
            return [*_CALLED.findall(head), *(name for group in listed for name in group)]
        return []


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A program: its computations by name, and the one that runs first."""

    computations: dict[str, Computation]
    entry: str

    def shape(self, computation: str, operand: str) -> Shape:
        """The array that an operand's name stands for; of a tuple the first."""
        return self.computations[computation][operand].shapes[0]


def parse(text: str) -> Module:
    """The module of a program's text.

    Raises:
      ValueError: text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif " = " in line and line.startswith(" "):
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError(f"no ENTRY computation in {len(text)} characters of program text")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    left, _, rest = line.partition(" = ")
    root = left.lstrip().startswith("ROOT ")
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    start = len(opcode)
    end = _closing(rest[start:]) + start
    argument = rest[start + 1 : end - 1]
    return Instruction(
        name=left.split()[-1].lstrip("%"),
        shapes=shapes_of(kind),
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", argument)),
        attributes=rest[end:],
        root=root,
        argument=argument,
    )


def _closing(text: str) -> int:
    """Where the parenthesis that opens `text` is closed, one past it."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


@functools.lru_cache(maxsize=100_000)
def shapes_of(kind: str) -> tuple[Shape, ...]:
    """The arrays of a type as printed. Memory space 0, or none, is HBM; 1 is on the chip."""
    return tuple(
        Shape(
            dtype,
            tuple(int(n) for n in dims.replace("<=", "").split(",") if n),
            not re.search(r"S\([1-9]\d*\)", layout),
        )
        for dtype, dims, layout in _ARRAY.findall(kind)
    )
