"""The tables of a comparison: loss, loss by domain, routing, size and cost, verdicts, config
differences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from moejax.routing.floors import drop_floor

from .cells import Cell, Column, Table
from .claims import Claim, Verdict
from .fairness import config_differences
from .metrics import Difference
from .paired import estimate, standard_deviation
from .results import Metric, Results, Run, lookup

LEAK_MARK = "†"


def all_tables(results: Results, judged: Sequence[tuple[Claim, Verdict]]) -> list[Table]:
    """Every table, verdicts first; tables without a row are left out."""
    tables = [
        verdict_table(judged),
        loss_table(results),
        domain_table(results),
        routing_table(results),
        without_table(results),
        size_table(results),
        speed_table(results),
        config_table(results),
    ]
    return [table for table in tables if table.rows]


def verdict_table(judged: Sequence[tuple[Claim, Verdict]]) -> Table:
    columns = (
        *(Column("claim"), Column("verdict"), Column("statement", "prose")),
        *(Column("strength"), Column("seeds", "integer"), Column("measured", "prose")),
    )
    rows = tuple(
        (c.id, shown_status(c, v), f"{c.statement} ({c.source})", c.strength, float(v.n), v.text)
        for c, v in judged
    )
    notes = (
        "Arms are paired by seed; a ± b: mean difference and one-sided 95 % half width (t). Held: "
        "the whole interval is inside the bound; not held: outside; else inconclusive. Strength S "
        "should hold at small scale, D is a direction (inconclusive is normal under 1e9 tokens), "
        "R is reported and not judged.",
    )
    return Table("verdicts", "Verdicts", columns, rows, notes)


def shown_status(claim: Claim, verdict: Verdict) -> str:
    """Claims of strength R are measured, not judged."""
    return "reported" if claim.strength == "R" else verdict.status


def loss_table(results: Results) -> Table:
    columns = (
        *(Column("variant"), Column("seeds", "integer"), Column("bpb ± sd", "bpb")),
        *(Column(f"vs {results.baseline} ± 95 %", "signed"), Column("bpb as trained", "bpb")),
        *(Column("leak", "signed"), Column("train loss", "bpb"), Column("training", "seconds")),
    )
    rows = []
    for variant, runs in results.finished():
        cells: list[Cell] = [label(variant, runs), float(len(runs)), _spread(runs, "eval.bpb")]
        cells += [_against_baseline(results, variant), _mean(runs, "eval.bpb_as_trained")]
        cells += [_mean(runs, "eval.leak"), _mean(runs, "train.loss"), _mean(runs, "seconds")]
        rows.append(tuple(cells))
    masked = "masked " if results.masked else ""
    notes = (
        f"bpb: {results.unit} of the evaluation text, lower is better; sd over seeds. The "
        "difference is paired by seed, ± its one-sided 95 % half width (as in the verdicts). Train "
        f"loss: nats per {masked}token, mean of the last 10 % of training.",
        *_leak_notes(results),
    )
    return Table("loss", "Loss", columns, tuple(rows), notes).without_empty_columns()


def domain_table(results: Results) -> Table:
    domains = domains_of(results)
    columns = (Column("variant"), *(Column(domain, "bpb") for domain in domains))
    rows = tuple(
        (label(variant, runs), *(_mean(runs, f"eval.bpb_domain.{domain}") for domain in domains))
        for variant, runs in results.finished()
        if domains
    )
    notes = (f"Mean over seeds, {results.unit}.",)
    return Table("domains", "Loss by domain", columns, rows, notes)


def routing_table(results: Results) -> Table:
    columns = (
        *(Column("variant"), Column("drop", "percent"), Column("by choice, %")),
        *(Column("random", "percent"), Column("drop eval", "percent")),
        *(Column("left", "percent"), Column("MaxVio batch", "ratio"), Column("floor", "ratio")),
        *(Column("MaxVio global", "ratio"), Column("floor", "ratio"), Column("dead", "percent")),
    )
    rows = []
    for variant, runs in results.finished():
        if not is_moe(runs[0]):
            continue
        cells: list[Cell] = [label(variant, runs)]
        cells += [_mean(runs, "train.drop"), _by_choice(runs), random_drops(runs[0])]
        cells += [_mean(runs, "eval.drop"), _mean(runs, "eval.left_behind")]
        cells.append(_spread(runs, "train.max_vio"))
        cells += [batch_floor(runs[0]), _spread(runs, "eval.max_vio_global")]
        cells += [_mean(runs, "eval.max_vio_floor"), _mean(runs, "eval.dead")]
        rows.append(tuple(cells))
    notes = (
        "Drop: share of the assignments that found their expert full, mean of the last 10 % of "
        "training; by choice: of the first / second / ... choices; random: what random routing "
        "would drop; eval: in evaluation. Left: evaluation tokens left with no expert. MaxVio: "
        "largest load / mean load - 1, mean of the layers, ± sd over seeds; batch: per training "
        "batch, last 10 %; global: over the whole evaluation set. Floor: what random routing "
        "gives by chance on as many tokens. Dead: experts without one evaluation token.",
    )
    return Table("routing", "Routing", columns, tuple(rows), notes).without_empty_columns()


def without_table(results: Results) -> Table:
    """Of runs with train.eval_without; no rows where there are none."""
    names = keys_of(results, "eval.without")
    columns = (
        *(Column("variant"), Column("bpb", "bpb")),
        *(Column(f"without {name.replace('_', ' ')}", "signed") for name in names),
    )
    rows = []
    for variant, runs in results.finished():
        more: list[Cell] = [
            _spread(runs, Difference(f"eval.without.{name}", "eval.bpb")) for name in names
        ]
        if any(cell is not None for cell in more):
            rows.append((label(variant, runs), _mean(runs, "eval.bpb"), *more))
    notes = (
        f"What {results.unit} rise by, ± sd over seeds, without training again. Shared: the shared "
        "experts give nothing. Best 0.25: in every layer each token's best experts, a quarter of "
        "all routed ones, are taken away, and the router chooses among the rest; where a table "
        "decides, the token has fewer.",
    )
    return Table("without", "Doing without", columns, tuple(rows), notes)


def size_table(results: Results) -> Table:
    columns = (
        *(Column("variant"), Column("total params", "si"), Column("active params", "si")),
        *(Column("FLOPs/token", "si"), Column("steps", "integer"), Column("tokens/step", "si")),
        *(Column("tokens", "si"), Column("eval tokens", "si"), Column("learning rate", "rate")),
    )
    rows = []
    for variant, runs in results.finished():
        one = runs[0]
        cells: list[Cell] = [label(variant, runs), one.value("run.params.total")]
        cells += [one.value("run.params.active"), one.value("run.flops_per_token")]
        cells += [one.value("step"), one.value("run.tokens_per_step"), _tokens(one)]
        cells += [_mean(runs, "eval.tokens"), one.value("config.optimizer.learning_rate")]
        rows.append(tuple(cells))
    notes = (
        "FLOPs per trained token, forward and backward, active matmuls and attention. Learning "
        "rate: the peak.",
    )
    return Table("size", "Size and budget", columns, tuple(rows), notes).without_empty_columns()


def speed_table(results: Results) -> Table:
    columns = (
        *(Column("variant"), Column("tokens/s", "si"), Column("MFU", "percent")),
        *(Column("training", "seconds"), Column("compile", "seconds")),
        *(Column("wall", "seconds"), Column("peak memory", "bytes")),
    )
    metrics = ("train.tokens_per_s", "train.mfu", "seconds", "compile_seconds", "wall_seconds")
    rows = tuple(
        (label(variant, runs), *(_mean(runs, m) for m in (*metrics, "peak_memory_bytes")))
        for variant, runs in results.finished()
    )
    notes = (
        "Means over seeds; MFU from active FLOPs; training: seconds in training steps, without "
        "compilation and evaluation; wall: with them.",
    )
    return Table("speed", "Speed", columns, rows, notes).without_empty_columns()


def config_table(results: Results) -> Table:
    variants = [variant for variant, _ in results.finished()]
    columns = (Column("key"), *(Column(variant, "any") for variant in variants))
    rows = tuple(
        (key, *(_plain(values.get(variant)) for variant in variants))
        for key, values in config_differences(results).items()
    )
    notes = ("Every config key that is not the same in all variants (seeds aside).",)
    return Table("config", "What differs", columns, rows, notes)


def is_moe(run: Run) -> bool:
    return bool(lookup(run.config, "moe.experts")) and run.info.get("moe_layers", 1) != 0


def domains_of(results: Results) -> list[str]:
    """Domains that any finished run was evaluated on, in their first order."""
    return keys_of(results, "eval.bpb_domain")


def keys_of(results: Results, metric: str) -> list[str]:
    """The names below a metric that any finished run has, in their first order."""
    found: dict[str, None] = {}
    for run in results.runs:
        found.update(dict.fromkeys(lookup(run.summary, metric) or {}))
    return list(found)


def batch_floor(run: Run) -> float | None:
    """MaxVio of random routing on one training batch: the evaluation's floor, which falls with the
    square root of the tokens."""
    floor, tokens = run.value("eval.max_vio_floor"), run.value("eval.tokens")
    batch = run.value("run.tokens_per_step")
    if floor is None or not tokens or not batch:
        return None
    return floor * math.sqrt(tokens / batch)


def random_drops(run: Run) -> float | None:
    """Share that random routing would drop in training; None where nothing can be dropped."""
    factor, k = run.value("config.moe.capacity_factor"), run.value("config.router.k")
    groups = {
        "batch": run.value("run.tokens_per_step"),
        "sequence": run.value("config.data.sequence"),
        "position": run.value("config.data.batch"),
    }
    size = groups.get(str(lookup(run.config, "moe.groups")))
    experts = run.value("config.moe.experts")
    if not factor or not k or not size or not experts or not run.value("train.drop"):
        return None
    parts = run.value("config.train.accumulation") or 1
    size = size if lookup(run.config, "moe.groups") == "sequence" else size / parts
    return drop_floor(round(size), int(experts), int(k), factor)


def values(runs: Sequence[Run], metric: Metric) -> list[float]:
    """The metric of every run that has it."""
    return [value for run in runs if (value := run.value(metric)) is not None]


def leaks(runs: Sequence[Run]) -> bool:
    return any(run.info.get("leaks") for run in runs)


def label(variant: str, runs: Sequence[Run]) -> str:
    """The variant's name, marked where its router lets a token see later ones."""
    return f"{variant} {LEAK_MARK}" if leaks(runs) else variant


def _mean(runs: Sequence[Run], metric: Metric) -> Cell:
    found = values(runs, metric)
    return sum(found) / len(found) if found else None


def _spread(runs: Sequence[Run], metric: Metric) -> Cell:
    found = values(runs, metric)
    return [sum(found) / len(found), standard_deviation(found)] if found else None


def _against_baseline(results: Results, variant: str) -> Cell:
    if variant == results.baseline:
        return None
    arm, base = results.of(variant), results.of(results.baseline)
    pairs = [
        (arm[s].value("eval.bpb"), base[s].value("eval.bpb")) for s in sorted(arm) if s in base
    ]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if not differences:
        return None
    d = estimate(differences)
    return [d.mean, d.half_width if math.isfinite(d.half_width) else None]


def _by_choice(runs: Sequence[Run]) -> Cell:
    """Drop shares in percent, "0.1 / 8.4"; nothing with one choice, or where nothing drops."""
    ranks = range(len(runs[0].train[-1].get("drop_k", []) if runs[0].train else []))
    shares = [_mean(runs, f"train.drop_k.{rank}") for rank in ranks]
    if len(shares) < 2 or not any(shares):
        return None
    return " / ".join(f"{100 * s:.1f}" for s in shares if isinstance(s, float))


def _tokens(run: Run) -> Cell:
    step, size = run.value("step"), run.value("run.tokens_per_step")
    return None if step is None or size is None else step * size


def _leak_notes(results: Results) -> list[str]:
    leaking = [variant for variant, runs in results.finished() if leaks(runs)]
    if not leaking:
        return []
    note = (
        f"{LEAK_MARK} {', '.join(leaking)}: as trained, the routing of a token depends on later "
        "tokens, so the training loss is not that of a language model. Where a column 'bpb as "
        "trained' has a value, bpb was measured with causal routing, and leak = bpb - bpb as "
        "trained is what the later tokens gave away; elsewhere bpb itself may profit from them."
    )
    return [note]


def _plain(value: Any) -> Cell:
    if isinstance(value, str) or value is None:
        return value
    return json.dumps(value)
