"""In what the arms differ: the config keys that do, and what makes a comparison unsound."""

from __future__ import annotations

import json
from typing import Any

from .results import NOT_STARTED, Results, Run, flatten, lookup


def config_differences(results: Results) -> dict[str, dict[str, Any]]:
    """Dotted key -> variant -> value, for the keys on which finished variants differ (seeds
    aside).
    """
    configs = {variant: flatten(runs[0].config) for variant, runs in results.finished()}
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    differences = {}
    for key in keys:
        values = {variant: config.get(key) for variant, config in configs.items()}
        if not _of_the_seed(key) and len({_text(v) for v in values.values()}) > 1:
            differences[key] = values
    return differences


def caveats(results: Results) -> list[str]:
    """One line each: why two arms may not be comparable, or what the tables leave out."""
    found = _incomplete(results)
    if note := results.suite.get("note", ""):
        found.append(f"Note: {note}.")
    by_reason: dict[str, list[str]] = {}
    for name, why in results.suite.get("unmatched", {}).items():
        by_reason.setdefault(why, []).append(name)
    found += [f"Not matched: {', '.join(names)}: {why}." for why, names in by_reason.items()]
    for label, key in (
        ("data", "run.data.fingerprint"),
        ("steps", "config.train.steps"),
        ("tokens a step", "run.tokens_per_step"),
        ("commit", "run.commit"),
        ("device", "run.device"),
        ("versions", "run.versions"),
    ):
        found += _disagreement(results, label, key)
    found += _edges(results)
    for variant, runs in results.finished():
        found += _seed_configs(variant, runs)
    for run in results.all_runs:
        if run.alarms:
            first, count = run.alarms[0], len(run.alarms)
            found.append(f"{run.name}: {count} alarms, at step {first['step']}: {first['message']}")
        if run.unreadable_lines:
            found.append(f"{run.name}: {run.unreadable_lines} unreadable lines in metrics.jsonl.")
    return found


def learning_rates(results: Results) -> str:
    """How the arms came to their learning rates."""
    swept = results.suite.get("learning_rates", {})
    if not swept:
        return "untuned; one for all arms, unless an arm is about it"
    chosen = ", ".join(f"{name} x{found['best']:g}" for name, found in swept.items())
    factors = ", ".join(f"x{factor}" for factor in next(iter(swept.values()))["loss"])
    return (
        f"each arm was trained at {factors} on a seed that is not among the results and kept the "
        f"one of lowest training loss, no evaluation text being used: {chosen}"
    )


def _incomplete(results: Results) -> list[str]:
    """Arms of which nothing was trained in one line; else a line a run."""
    waiting = results.incomplete
    absent = [
        variant
        for variant in results.variants
        if {waiting.get(f"{variant}/seed{s}") for s in results.seeds} == {NOT_STARTED}
    ]
    found = [f"Not trained: {', '.join(absent)}."] if absent else []
    return found + [
        f"Incomplete: {name}: {why}."
        for name, why in waiting.items()
        if name.split("/")[0] not in absent
    ]


def _edges(results: Results) -> list[str]:
    """Arms whose best learning rate is the smallest or the largest tried."""
    found = []
    for word, edge in (("smallest", min), ("largest", max)):
        names = [
            name
            for name, swept in results.suite.get("learning_rates", {}).items()
            if len(swept["loss"]) > 1 and swept["best"] == edge(map(float, swept["loss"]))
        ]
        if names:
            found.append(f"The best learning rate is the {word} that was tried: {_names(names)}.")
    return found


def _disagreement(results: Results, label: str, key: str) -> list[str]:
    groups: dict[str, list[str]] = {}
    for run in results.runs:
        value = lookup({"run": run.info, "config": run.config}, key)
        groups.setdefault(_text(value), []).append(run.name)
    if len(groups) < 2:
        return []
    parts = "; ".join(f"{value}: {_names(names)}" for value, names in groups.items())
    return [f"Runs differ in {label} ({parts})."]


def _seed_configs(variant: str, runs: list[Run]) -> list[str]:
    first = flatten(runs[0].config)
    for run in runs[1:]:
        other = flatten(run.config)
        keys = [
            k for k in {**first, **other} if not _of_the_seed(k) and first.get(k) != other.get(k)
        ]
        if keys:
            return [
                f"Seeds of {variant} differ in {keys[0]}: {first.get(keys[0])} (seed "
                f"{runs[0].seed}) and {other.get(keys[0])} (seed {run.seed})."
            ]
    return []


def _of_the_seed(key: str) -> bool:
    """Differs from run to run of one arm: a seed, or the folder of the run it started from."""
    return key.rpartition(".")[2] == "seed" or key == "train.upcycle"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
