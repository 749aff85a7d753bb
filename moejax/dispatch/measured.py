"""Which of several implementations is fastest here: each is run, and one that fails is named."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Choice(NamedTuple):
    """An implementation's name, and the reason for it."""

    name: str
    why: str


class Measured(NamedTuple):
    """The fastest of several implementations.

    Attributes:
      name: its name.
      told: the time of each, and who failed and why.
      lasting: False where memory was short: who failed for that may run another time.
    """

    name: str
    told: str
    lasting: bool = True

    def choice(self, day: str = "") -> Choice:
        """day: of an earlier measurement."""
        return Choice(self.name, f"the fastest measured here{day and f' on {day}'}: {self.told}")


def fastest(
    runs: Mapping[str, Callable[[], Any]], check: Callable[[Any], None], repeats: int = 3
) -> Measured:
    """The fastest of some functions whose results are right.

    Args:
      runs: the functions, by name.
      check: raises ValueError for a result that is wrong: fast is not enough.
      repeats: of which the best counts.

    Raises:
      RuntimeError: all of them fail.
    """
    seconds, failed, lasting = {}, [], True
    for name, run in runs.items():
        try:
            check(jax.block_until_ready(run()))  # compiles
            seconds[name] = _best(run, repeats)
        except Exception as error:  # whatever a kernel library says: it is not for this machine
            failed.append(f"{name} failed: {reason(error)}")
            lasting = lasting and not _memory_was_short(error)
    if not seconds:
        raise RuntimeError(f"no implementation runs here: {'; '.join(failed)}")
    told = [f"{name} {1e3 * best:.2f} ms" for name, best in seconds.items()]
    chosen = min(seconds, key=lambda name: seconds[name])
    return Measured(chosen, "; ".join([*told, *failed]), lasting)


def reason(error: Exception) -> str:
    """In one short line."""
    first = next(filter(str.strip, str(error).splitlines()), type(error).__name__)
    return first.strip()[:200]


def _memory_was_short(error: Exception) -> bool:
    # XLA's status, and what CUDA says inside another one.
    text = str(error).upper().replace("_", " ")
    signs = "RESOURCE EXHAUSTED", "OUT OF MEMORY"
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def _best(run: Callable[[], Any], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return min(taken)
