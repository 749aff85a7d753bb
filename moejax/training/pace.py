"""How long the runs of a comparison will still take, judged by those that are done."""

import dataclasses
import functools
from collections.abc import Iterable
from statistics import mean

from moejax.config import Config
from moejax.model.size import model_size

VOCABULARY = 256  # bytes: the text is not known yet, and only ratios of FLOPs count


class Pace:
    """What runs took so far.

    A run takes its FLOPs at the pace of its own arm, or, where that has none yet, of all; and where
    its program is new, what others took to start: to compile, above all.
    """

    def __init__(self) -> None:
        self._paces: dict[Config, float] = {}
        self._programs: set[Config] = set()
        self._starts: list[float] = []

    def took(self, config: Config, seconds: float, trained: float) -> None:
        """A run is done, in `seconds` from here; its steps took `trained`, those before a cut
        too."""
        program = _program(config)
        if program in self._programs:
            trained = max(trained, seconds)  # with its evaluations
        else:
            self._starts.append(max(0.0, seconds - trained))
        self._programs.add(program)
        self._paces[_arm(config)] = trained / _flops(_arm(config))

    def left(self, configs: Iterable[Config]) -> float | None:
        """Seconds that these will take, in this order; None = no run is done."""
        if not self._paces:
            return None
        usual, start = mean(self._paces.values()), mean(self._starts)
        programs, seconds = set(self._programs), 0.0
        for config in configs:
            arm, program = _arm(config), _program(config)
            seconds += _flops(arm) * self._paces.get(arm, usual) + start * (program not in programs)
            programs.add(program)
        return seconds


def _program(config: Config) -> Config:
    """All that is compiled in."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0))


def _arm(config: Config) -> Config:
    """All that a step's time depends on."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1.0)
    return dataclasses.replace(_program(config), optimizer=optimizer)


@functools.lru_cache(maxsize=256)
def _flops(arm: Config) -> float:
    """Of a run's training steps."""
    tokens = arm.train.steps * arm.data.batch * arm.data.sequence
    return tokens * model_size(arm, VOCABULARY).flops
