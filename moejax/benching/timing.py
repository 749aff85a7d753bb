"""Seconds, taken in turns: what is compared runs in one process, one of each a turn.

A ratio is the median over turns, so it survives a busy machine; a single time does not.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Compiled(NamedTuple):
    """A function compiled ahead for its arguments, and what that says.

    Attributes:
      run: calls it.
      compile_seconds: tracing, lowering and compiling.
      temp_bytes: what it needs on one device besides arguments and results.
    """

    run: Callable[[], Any]
    compile_seconds: float
    temp_bytes: int


def compiled(function: Callable[..., Any], *arguments: Any) -> Compiled:
    start = time.perf_counter()
    made = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory: Any = made.memory_analysis()
    return Compiled(lambda: made(*arguments), seconds, int(memory.temp_size_in_bytes))


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each, one of each a turn, after a first turn that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def rate(seconds: Mapping[str, np.ndarray], name: str, against: str) -> float:
    """How many times as fast `name` is as `against`."""
    return float(np.median(seconds[against] / seconds[name]))
