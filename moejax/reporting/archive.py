"""Runs inside one JSON file: enough of each to derive every table and verdict again, without the
run's folder. Expert loads over time, which only pictures need, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .layers import PANELS
from .results import Record, Results, Run

_PICTURES_ONLY = ("kind", "load_LE", "load_domain", *PANELS)


def archived(run: Run) -> Record:
    """A finished run as one object; its records by column."""
    return {
        **{"variant": run.variant, "seed": run.seed, "summary": run.summary},
        **{"run": run.info, "config": portable(run.config)},
        **{"train": _columns(run.train), "evals": _columns(run.evals)},
        **({"alarms": list(run.alarms)} if run.alarms else {}),
    }


def restored(summary: Mapping[str, Any]) -> Results:
    """The results that a summary.json was written from: its finished runs only.

    Raises:
      ValueError: a summary that is older than archives.
    """
    if "suite" not in summary or any("train" not in run for run in summary["runs"]):
        raise ValueError(f"summary of {summary.get('name')} holds no records of its runs")
    suite = summary["suite"]
    return Results(
        name=summary["name"],
        scale=summary["scale"],
        question=summary["question"],
        variants=summary["variants"],
        seeds=tuple(sorted({run["seed"] for run in summary["runs"]})),
        baseline=summary["baseline"],
        command=summary["provenance"].get("command", ""),
        suite=suite,
        all_runs=tuple(_run(run) for run in summary["runs"]),
    )


def portable(config: Record) -> Record:
    """Where a run started from another, that one's name: its folder is this machine's affair."""
    train = config.get("train", {})
    if not train.get("upcycle"):
        return config
    return {**config, "train": {**train, "upcycle": "/".join(Path(train["upcycle"]).parts[-2:])}}


def _run(found: Record) -> Run:
    return Run(
        variant=found["variant"],
        seed=found["seed"],
        path=Path(found["variant"]) / f"seed{found['seed']}",
        config=found["config"],
        info=found["run"],
        train=_records(found["train"]),
        evals=_records(found["evals"]),
        summary=_numbers(found["summary"]),
        alarms=tuple(found.get("alarms", ())),
    )


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for record in records for name in record)
    return {
        name: [record.get(name) for record in records]
        for name in names
        if name not in _PICTURES_ONLY
    }


def _records(columns: Mapping[str, Sequence[Any]]) -> tuple[Record, ...]:
    rows = zip(*columns.values(), strict=True)
    return tuple(
        {k: _numbers(v) for k, v in zip(columns, row, strict=True) if v is not None} for row in rows
    )


def _numbers(value: Any) -> Any:
    """What `jsonable` had to write as a word, a number again."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    words = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    return words.get(value, value) if isinstance(value, str) else value
