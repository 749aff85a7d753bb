"""The runs of a comparison: what tables, figures and judges are made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
NOT_STARTED = "not started"


@dataclass(frozen=True)
class Run:
    """One training run. `missing` says why it counts as incomplete; None for a finished run."""

    variant: str
    seed: int
    path: Path
    config: Record = field(repr=False)
    info: Record = field(repr=False)
    train: tuple[Record, ...] = field(repr=False)
    evals: tuple[Record, ...] = field(repr=False)
    summary: Record = field(repr=False)
    missing: str | None = None
    alarms: tuple[Record, ...] = ()
    unreadable_lines: int = 0

    @property
    def name(self) -> str:
        return f"{self.variant}/seed{self.seed}"

    @property
    def last_step(self) -> int:
        return max((int(r["step"]) for r in (*self.train, *self.evals)), default=0)

    @property
    def fingerprint(self) -> str:
        return str(self.info.get("data", {}).get("fingerprint", ""))

    def value(self, metric: Metric) -> float | None:
        """A number by dotted name, or None where the run has none.

        The name is looked up in summary.json ("eval.bpb", "train.drop_k.1", "seconds"), under
        "run." in run.json, under "config." in config.json. A "train." number that the summary lacks
        is the mean over the last 10 % of training. "eval.leak" = eval.bpb - eval.bpb_as_trained.
        """
        if not isinstance(metric, str):
            return metric(self)
        if metric == "eval.leak":
            causal, pooled = self.value("eval.bpb"), self.value("eval.bpb_as_trained")
            return None if causal is None or pooled is None else causal - pooled
        found = lookup({**self.summary, "run": self.info, "config": self.config}, metric)
        if found is None and metric.startswith("train."):
            found = self.mean(metric.removeprefix("train."), 0.9, 1.0)
        return float(found) if isinstance(found, int | float) else None

    def mean(self, name: str, start: float, stop: float) -> float | None:
        """Mean of a field of the training records between two shares of the run (0 = start)."""
        last = self.last_step
        inside = [r for r in self.train if start * last < r["step"] <= stop * last]
        values = [v for r in inside if isinstance(v := lookup(r, name), int | float)]
        return math.fsum(values) / len(values) if values else None


Metric = str | Callable[[Run], float | None]


@dataclass(frozen=True)
class Results:
    """Runs of one comparison, complete and incomplete, with what suite.json says about it."""

    name: str
    scale: str
    question: str
    variants: dict[str, str]  # name -> description, in the order of the tables
    seeds: tuple[int, ...]
    baseline: str
    command: str
    suite: Record = field(repr=False)  # suite.json as written, of the first directory
    all_runs: tuple[Run, ...]

    @property
    def masked(self) -> bool:
        """Whether only masked tokens are predicted."""
        return any(run.value("config.data.mask_rate") for run in self.runs)

    @property
    def unit(self) -> str:
        """What a bpb counts."""
        return "bits per masked byte" if self.masked else "bits per byte"

    @property
    def runs(self) -> tuple[Run, ...]:
        """The finished runs: the only ones that tables and verdicts use."""
        return tuple(run for run in self.all_runs if run.missing is None)

    @property
    def incomplete(self) -> dict[str, str]:
        """Run name -> why it does not count; runs that suite.json announces but that never began
        too.
        """
        present = {(run.variant, run.seed) for run in self.all_runs}
        waiting = {run.name: run.missing for run in self.all_runs if run.missing is not None}
        for variant in self.variants:
            for seed in self.seeds:
                if (variant, seed) not in present:
                    waiting[f"{variant}/seed{seed}"] = NOT_STARTED
        return waiting

    def of(self, variant: str) -> dict[int, Run]:
        """Finished runs of a variant by seed."""
        return {run.seed: run for run in self.runs if run.variant == variant}

    def finished(self) -> Iterator[tuple[str, list[Run]]]:
        """(variant, its finished runs) in table order, variants without one left out."""
        for variant in self.variants:
            if runs := self.of(variant):
                yield variant, [runs[seed] for seed in sorted(runs)]


def lookup(tree: Any, dotted: str) -> Any:
    """tree["a"]["b"][1] for "a.b.1"; a key may itself contain dots (data domains do). None if
    absent.
    """
    if isinstance(tree, list | tuple):
        head, _, rest = dotted.partition(".")
        if not head.isdigit() or int(head) >= len(tree):
            return None
        return lookup(tree[int(head)], rest) if rest else tree[int(head)]
    if not isinstance(tree, Mapping):
        return None
    if dotted in tree:
        return tree[dotted]
    parts = dotted.split(".")
    for cut in range(1, len(parts)):
        if (head := ".".join(parts[:cut])) in tree:
            found = lookup(tree[head], ".".join(parts[cut:]))
            if found is not None:
                return found
    return None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
