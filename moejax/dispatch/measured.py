"""Which of several implementations is fastest here: each is run, and one that fails is named."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Choice(NamedTuple):
    """An implementation's name, and the reason for it."""

    name: str
    why: str


def fastest(
    runs: Mapping[str, Callable[[], Any]], check: Callable[[Any], None], repeats: int = 3
) -> Choice:
    """The fastest of some functions; the reason holds the time of each, and who failed and why.

    Args:
      runs: the functions, by name.
      check: raises ValueError for a result that is wrong: fast is not enough.
      repeats: of which the best counts.

    Raises:
      RuntimeError: all of them fail.
    """
    seconds, failed = {}, []
    for name, run in runs.items():
        try:
            check(jax.block_until_ready(run()))  # compiles
            seconds[name] = _best(run, repeats)
        except Exception as error:  # whatever a kernel library says: it is not for this machine
            failed.append(f"{name} failed: {reason(error)}")
    if not seconds:
        raise RuntimeError(f"no implementation runs here: {'; '.join(failed)}")
    told = [f"{name} {1e3 * best:.2f} ms" for name, best in seconds.items()]
    chosen = min(seconds, key=lambda name: seconds[name])
    return Choice(chosen, f"the fastest measured here: {'; '.join([*told, *failed])}")


def reason(error: Exception) -> str:
    """In one short line."""
    first = next(filter(str.strip, str(error).splitlines()), type(error).__name__)
    return first.strip()[:200]


def _best(run: Callable[[], Any], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return min(taken)
