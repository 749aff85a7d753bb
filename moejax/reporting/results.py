"""What a comparison left on disk: OUT/<variant>/seed<k>/ and OUT/suite.json, one or several OUTs
merged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Record = dict[str, Any]


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
    def unit(self) -> str:
        """What a bpb counts."""
        masked = any(run.value("config.data.mask_rate") for run in self.runs)
        return "bits per masked byte" if masked else "bits per byte"

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
                    waiting[f"{variant}/seed{seed}"] = "not started"
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


def load(*outs: str | Path) -> Results:
    """Read compare directories and merge them.

    Raises FileNotFoundError for a directory without suite.json and ValueError when two directories
    belong to different suites or hold the same run with another config or other data.
    """
    if not outs:
        raise ValueError("no compare directory given: name at least one")
    suites = [(Path(out), _read_suite(Path(out))) for out in outs]
    _check_same_suite(suites)
    runs: dict[tuple[str, int], Run] = {}
    for out, _ in suites:
        for run in _read_runs(out):
            key = run.variant, run.seed
            runs[key] = _choose(runs[key], run) if key in runs else run
    return _merge([suite for _, suite in suites], list(runs.values()))


def _merge(suites: list[Record], runs: list[Run]) -> Results:
    variants: dict[str, str] = {}
    for suite in suites:
        for name, description in suite["variants"].items():
            variants.setdefault(name, description)
    for run in runs:
        variants.setdefault(run.variant, "")
    rates = {k: v for suite in suites for k, v in suite.get("learning_rates", {}).items()}
    first = {**suites[0], **({"learning_rates": rates} if rates else {})}
    return Results(
        name=first["name"],
        scale=first.get("scale", ""),
        question=first.get("question", ""),
        variants=variants,
        seeds=tuple(sorted({int(seed) for suite in suites for seed in suite["seeds"]})),
        baseline=first.get("baseline", ""),
        command="\n".join(dict.fromkeys(s["command"] for s in suites if s.get("command"))),
        suite=first,
        all_runs=tuple(runs),
    )


def _read_suite(out: Path) -> Record:
    path = out / "suite.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: give the output directory of a comparison")
    suite = json.loads(path.read_text())
    if absent := [key for key in ("name", "variants", "seeds") if key not in suite]:
        raise ValueError(f"{path} has no {', '.join(absent)}: run the comparison again")
    return suite


def _check_same_suite(suites: list[tuple[Path, Record]]) -> None:
    first_out, first = suites[0]
    for out, suite in suites[1:]:
        for key in ("name", "scale", "baseline"):
            if suite.get(key) != first.get(key):
                raise ValueError(
                    f"{first_out} and {out} are different comparisons: {key} "
                    f"{first.get(key)!r} and {suite.get(key)!r}; report them apart"
                )


def _read_runs(out: Path) -> Iterator[Run]:
    for path in sorted(out.glob("*/seed*")):
        if (match := re.fullmatch(r"seed(\d+)", path.name)) and path.is_dir():
            yield _read_run(path, path.parent.name, int(match.group(1)))


def _read_run(path: Path, variant: str, seed: int) -> Run:
    config, info, summary = (_read_json(path / f"{n}.json") for n in ("config", "run", "summary"))
    kinds, unreadable = _read_metrics(path / "metrics.jsonl")
    run = Run(
        *(variant, seed, path, config, info, kinds["train"], kinds["eval"], summary),
        alarms=kinds["alarm"],
        unreadable_lines=unreadable,
    )
    absent = [
        n for n, part in (("config", config), ("run", info), ("summary", summary)) if not part
    ]
    if not absent:
        return run
    steps = lookup(config, "train.steps") or "?"
    reason = f"no {absent[0]}.json, stopped at step {run.last_step} of {steps}"
    return replace(run, missing=reason)


def _read_json(path: Path) -> Record:
    """The object in the file; {} where the file is absent or was cut off while being written."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_metrics(path: Path) -> tuple[dict[str, tuple[Record, ...]], int]:
    """Records by kind and step, and how many lines before the last could not be read.

    A killed process leaves a torn last line; a resumed one may repeat the steps after its
    checkpoint: the later record of a step counts.
    """
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    kinds: dict[str, dict[int, Record]] = {"train": {}, "eval": {}, "alarm": {}}
    unreadable = 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            kinds.setdefault(record["kind"], {})[int(record["step"])] = record
        except (json.JSONDecodeError, KeyError, TypeError):
            unreadable += bool(line.strip()) and number < len(lines)
    return {
        kind: tuple(r for _, r in sorted(found.items())) for kind, found in kinds.items()
    }, unreadable


def _choose(old: Run, new: Run) -> Run:
    """The run to keep of two copies: they must be the same experiment; the finished, longer one
    wins.
    """
    if old.config and new.config and (key := _first_difference(old.config, new.config)):
        raise ValueError(
            f"{old.path} and {new.path} are both {new.name} but differ in {key}: "
            f"{lookup(old.config, key)} and {lookup(new.config, key)}; report one of them"
        )
    if old.fingerprint and new.fingerprint and old.fingerprint != new.fingerprint:
        raise ValueError(
            f"{old.path} and {new.path} are both {new.name} but saw different data: "
            f"{old.fingerprint} and {new.fingerprint}; report one of them"
        )
    return max(old, new, key=lambda run: (run.missing is None, run.last_step))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _first_difference(a: Record, b: Record) -> str | None:
    flat_a, flat_b = flatten(a), flatten(b)
    for key in (*flat_a, *flat_b):
        if flat_a.get(key) != flat_b.get(key):
            return key
    return None
