"""How long the runs of a comparison will still take, judged by those that are done."""

import functools
from collections.abc import Iterable
from statistics import mean

from moejax.config import Config
from moejax.model.size import model_size
from moejax.training.coefficients import compiled_in

VOCABULARY = 256  # bytes: the text is not known yet, and only ratios of FLOPs count


class Pace:
    """What runs took so far.

    A run takes its FLOPs at the pace of its own program, or, where that has none yet, of all; and
    where it is new, what others took to start: to compile, above all.
    """

    def __init__(self) -> None:
        self._paces: dict[Config, float] = {}
        self._starts: list[float] = []

    def took(self, config: Config, seconds: float, trained: float) -> None:
        """A run is done, in `seconds` from here; its steps took `trained`, those before a cut
        too."""
        program = compiled_in(config)
        if program in self._paces:
            trained = max(trained, seconds)  # with its evaluations
        else:
            self._starts.append(max(0.0, seconds - trained))
        self._paces[program] = trained / _flops(program)

    def left(self, configs: Iterable[Config]) -> float | None:
        """Seconds that these will take, in this order; None = no run is done."""
        if not self._paces:
            return None
        usual, start = mean(self._paces.values()), mean(self._starts)
        programs, seconds = set(self._paces), 0.0
        for config in configs:
            program = compiled_in(config)
            seconds += _flops(program) * self._paces.get(program, usual)
            seconds += start * (program not in programs)
            programs.add(program)
        return seconds


@functools.lru_cache(maxsize=256)
def _flops(program: Config) -> float:
    """Of a run's training steps."""
    tokens = program.train.steps * program.data.batch * program.data.sequence
    return tokens * model_size(program, VOCABULARY).flops
