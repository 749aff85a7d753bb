"""Seconds, taken in turns: what is compared runs in one process, one of each a turn.

A ratio is the median over turns, so it survives a busy machine; a single time does not.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

# A turn calls what is quicker several times: starting a program takes a GPU's host about 0.1 ms,
# which is hidden while the one before still runs.
LEAST_SECONDS = 0.02


class Compiled(NamedTuple):
    """A function compiled ahead for its arguments, and what that says.

    Attributes:
      run: calls it; the result has a `block_until_ready`, or arrays that do.
      compile_seconds: tracing, lowering and compiling; 0 = not known.
      temp_bytes: what it needs on one device besides arguments and results.
    """

    run: Callable[[], Any]
    compile_seconds: float = 0.0
    temp_bytes: int = 0


def compiled(function: Callable[..., Any], *arguments: Any) -> Compiled:
    start = time.perf_counter()
    made = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory: Any = made.memory_analysis()
    return Compiled(lambda: made(*arguments), seconds, int(memory.temp_size_in_bytes))


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of a call of each, one turn after the other, after two that warm up and say how many
    calls make a turn."""
    for run in runs.values():
        _seconds(run, 1)
    calls = {
        name: math.ceil(LEAST_SECONDS / max(_seconds(run, 1), 1e-4)) for name, run in runs.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(_seconds(run, calls[name]))
    return {name: np.array(values) for name, values in seconds.items()}


def _seconds(run: Callable[[], Any], calls: int) -> float:
    """Of one of so many calls, of which only the last is waited for."""
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def rate(seconds: Mapping[str, np.ndarray], name: str, against: str) -> float:
    """How many times as fast `name` is as `against`."""
    return float(np.median(seconds[against] / seconds[name]))
