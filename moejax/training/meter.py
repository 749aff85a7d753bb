"""The run's clock and alarms: reads metrics one step late, so that the device never waits for the
host."""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_ALARM_AFTER = 3  # logged records in a row


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; says at which step and on which rows."""


class Meter:
    """Times steps, keeps the running mean loss, and watches for what should stop or worry a run."""

    def __init__(
        self, tokens: int, flops: float, peak: float, carried: Mapping[str, Any] | None = None
    ) -> None:
        """tokens: per step; flops: per step; peak: FLOP/s; carried: of the attempt before this
        one."""
        self._tokens, self._flops, self._peak = tokens, flops, peak
        carried = carried or {}
        self.seconds: float = carried.get("seconds", 0.0)
        self._pending: tuple[int, int, Any] | None = None
        self._losses: list[float] = list(carried.get("losses", []))
        self._latest: dict[str, Any] = {}
        self._mark: float | None = None
        self._steps = 0
        self._since = 0.0
        self._collapsed: int = carried.get("collapsed", 0)

    def carried(self) -> dict[str, Any]:
        """What a resumed run must know to write the same records: plain values, after a `flush`."""
        return {"seconds": self.seconds, "losses": self._losses, "collapsed": self._collapsed}

    def push(self, step: int, position: int, metrics: dict[str, Any]) -> int | None:
        """Take a step's metrics, still being computed, and settle those of the step before.

        Returns:
          The step that was settled, if any: what `record` now speaks of.
        """
        if self._mark is None:
            self._mark = time.perf_counter()
        previous, self._pending = self._pending, (step, position, metrics)
        return self._settle(previous)

    def flush(self) -> int | None:
        """Wait for the last step and stop the clock: what follows is not training. Returns as
        `push`."""
        previous, self._pending = self._pending, None
        settled = self._settle(previous)
        self._mark = None
        return settled

    def _settle(self, pending: tuple[int, int, Any] | None) -> int | None:
        if pending is None:
            return None
        step, position, metrics = pending
        loss = float(metrics["loss"])
        if not math.isfinite(loss) or not math.isfinite(float(metrics["grad_norm"])):
            raise NonFiniteLoss(
                f"step {step}: loss {loss}, gradient norm {float(metrics['grad_norm'])}, on the "
                "rows "
                f"that end at position {position} of the data stream; nothing was saved since; "
                "lower "
                "optimizer.learning_rate, or set optimizer.clip"
            )
        self._losses.append(loss)
        self._latest = metrics
        self._steps += 1
        now = time.perf_counter()
        if self._mark is not None:
            self.seconds += now - self._mark
            self._since += now - self._mark
            self._mark = now
        return step

    def record(self, step: int, learning_rate: float) -> dict[str, Any]:
        """The record of the step just settled: loss averaged since the last record, the rest its
        own."""
        rate = self._steps / max(self._since, 1e-9)
        metrics = jax.device_get(self._latest)
        record = {
            "kind": "train",
            "step": step,
            "seconds": self.seconds,
            **metrics,
            "loss": float(np.mean(self._losses)),
            "tokens_per_s": rate * self._tokens,
            "mfu": rate * self._flops / self._peak,
            "learning_rate": learning_rate,
        }
        self._losses, self._steps, self._since = [], 0, 0.0
        return record

    def alarm(self, record: dict[str, Any], share: float, k: float, experts: int) -> str | None:
        """A line when one expert has got more than `share` of a layer's tokens for some records,
        and twice as much as its layer's mean: where all experts are busy, none is crowded."""
        if "busiest" not in record or k >= experts:
            return None
        crowded = (np.max(record["load_LE"], -1) >= 2 * np.mean(record["load_LE"], -1)).any()
        self._collapsed = self._collapsed + 1 if crowded and record["busiest"] >= share else 0
        if self._collapsed != _ALARM_AFTER:
            return None
        return (
            f"routing collapses: at step {record['step']} one expert gets {record['busiest']:.0%} "
            "of "
            f"a layer's tokens (even: {k / experts:.0%}); raise balance.load_balance or "
            "router.bias_rate, or lower the learning rate"
        )
