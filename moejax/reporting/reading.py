"""What comparisons left on disk, merged: OUT/suite.json, and OUT/<variant>/seed<k>/ of each run or
OUT/summary.json, in which a report keeps its finished runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .archive import portable, restored
from .results import Record, Results, Run, flatten, lookup


def load(*outs: str | Path) -> Results:
    """Read the directories of comparisons, or of their reports, and merge them.

    Raises FileNotFoundError for a directory without suite.json and ValueError when two directories
    belong to different suites or hold the same run with another config or other data.
    """
    if not outs:
        raise ValueError("no compare directory given: name at least one")
    suites = [(Path(out), _read_suite(Path(out))) for out in outs]
    _check_same_suite(suites)
    runs: dict[tuple[str, int], Run] = {}
    for out, _ in suites:
        trained = list(_read_runs(out))
        archive = _archived_runs(out, {(run.variant, run.seed) for run in trained})
        for run in (*trained, *archive):
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


def _archived_runs(out: Path, present: set[tuple[str, int]]) -> Iterator[Run]:
    """What a report's summary.json holds of runs whose folders are not there."""
    summary = _read_json(out / "summary.json")
    runs = [r for r in summary.get("runs", []) if (r["variant"], r["seed"]) not in present]
    if runs:
        yield from restored({**summary, "runs": runs}).all_runs


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
    if old.config and new.config and (key := first_difference(old.config, new.config)):
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


def first_difference(a: Record, b: Record) -> str | None:
    """The first key in which two configs differ; None where none does. Of a run that another one
    started from, the name counts, not on which machine its folder was."""
    flat_a, flat_b = flatten(portable(a)), flatten(portable(b))
    for key in (*flat_a, *flat_b):
        if flat_a.get(key) != flat_b.get(key):
            return key
    return None
