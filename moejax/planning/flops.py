"""Floating-point operations of the matrix products in a compiled program, loops multiplied out.

TPU programs write matrix products as convolutions: batch axes become spatial ones, dilated so that
each position meets one kernel element only. Kernels written by hand say what they cost.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from moejax.planning.hlo import Instruction, Module
from moejax.planning.loops import Runs


class Flops(NamedTuple):
    """Operations of one step on one device, a multiply-add counted as two.

    Attributes:
      products: matrix products and convolutions.
      kernels: what hand-written kernels state: grouped matrix products over all rows of their
        buffer, although a run computes only the rows that hold tokens.
    """

    products: float
    kernels: float

    @property
    def total(self) -> float:
        return self.products + self.kernels


def count_flops(module: Module, runs: Runs) -> Flops:
    """Over every instruction, times how often it runs."""
    products = kernels = 0.0
    for name, times in runs.times.items():
        for instruction in module.computations[name].values():
            if instruction.opcode == "convolution":
                products += times * _convolution(module, name, instruction)
            elif instruction.opcode == "dot":
                products += times * _dot(module, name, instruction)
            elif instruction.opcode == "custom-call":
                kernels += times * stated(instruction)
    return Flops(products, kernels)


def stated(instruction: Instruction) -> float:
    """The operations that a kernel's own cost estimate names."""
    found = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
    return float(found[1]) if found else 0.0


def _dot(module: Module, computation: str, dot: Instruction) -> float:
    left = module.shape(computation, dot.operands[0]).dims
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    summed = [left[int(axis)] for axis in found[1].split(",") if axis] if found else []
    return 2.0 * math.prod(dot.shapes[0].dims) * math.prod(summed)


def _convolution(module: Module, computation: str, convolution: Instruction) -> float:
    """2 x batch x outputs x inputs x the pairs of positions whose product is not with padding."""
    left, right = (module.shape(computation, name).dims for name in convolution.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        raise ValueError(f"convolution without dim_labels: {convolution.name}")
    lhs, rhs = dict(zip(labels[1], left, strict=True)), dict(zip(labels[2], right, strict=True))
    out = dict(zip(labels[3], convolution.shapes[0].dims, strict=True))
    window = _window(convolution.attributes)
    pairs = 1
    for axis in sorted(set(labels[2]) - {"i", "o"}):
        pairs *= _pairs(lhs[axis], rhs[axis], out[axis], window, int(axis))
    batch = lhs["b"] // convolution.number("batch_group_count", 1)
    return 2.0 * batch * rhs["o"] * rhs["i"] * pairs


def _window(attributes: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = (part.split("=") for part in found[1].split()) if found else ()
    return {name: value.split("x") for name, value in parts}


def _pairs(lhs: int, rhs: int, out: int, window: dict[str, list[str]], axis: int) -> int:
    """(output, kernel) positions along an axis that meet an element of the input."""

    def value(name: str, default: str) -> str:
        values = window.get(name)
        return values[axis] if values else default

    low = int(value("pad", "0_0").split("_")[0])
    stride, spread = int(value("stride", "1")), int(value("lhs_dilate", "1"))
    apart = int(value("rhs_dilate", "1"))
    at = np.arange(out)[:, None] * stride + np.arange(rhs)[None] * apart - low
    return int(((at >= 0) & (at % spread == 0) & (at // spread < lhs)).sum())
