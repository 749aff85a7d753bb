"""One call from results to files: report.md, report.html, figures/*.png and summary.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.storage import write_atomically

from .archive import archived
from .cells import Table, jsonable, markdown, terminal
from .claims import Claim, Verdict
from .fairness import caveats, learning_rates
from .figures import Figure
from .page import page
from .plots import all_figures
from .results import Results, flatten, lookup
from .suite import Suite
from .tables import all_tables, shown_status

Judged = list[tuple[Claim, Verdict]]


def write_report(results: Results, suite: Suite, out: str | Path) -> str:
    """Judge the suite's claims, write the report under `out` and return its text for the terminal.

    With suite.json, so that `load` reads the report as it reads the comparison's own folder. Every
    file appears complete or not at all. Raises ValueError where no run is finished.
    """
    if not results.runs:
        names = ", ".join(results.incomplete) or "none"
        raise ValueError(f"no finished run to report in {results.name} (incomplete: {names})")
    out = Path(out)
    judged = judge(results, suite)
    tables = all_tables(results, judged)
    figures = all_figures(results)
    for figure in figures:
        write_atomically(out / "figures" / f"{figure.name}.png", figure.png)
    write_atomically(out / "suite.json", json.dumps(_merged_suite(results), indent=2).encode())
    summary = written(_summary(results, judged, tables))
    write_atomically(out / "summary.json", summary.encode() + b"\n")
    write_atomically(out / "report.md", _markdown(results, judged, tables, figures).encode())
    write_atomically(out / "report.html", _html(results, judged, tables, figures).encode())
    return _text(results, judged, tables)


def written(summary: dict[str, Any]) -> str:
    """As JSON: one line a key, and one line a run, so that a file of many runs stays small."""
    runs = ",\n  ".join(json.dumps(run, allow_nan=False) for run in summary["runs"])
    text = json.dumps({**summary, "runs": []}, indent=1, allow_nan=False)
    return text.replace('"runs": []', f'"runs": [\n  {runs}\n ]')


def _merged_suite(results: Results) -> dict[str, Any]:
    """suite.json of what may be several directories."""
    merged = {"variants": results.variants, "seeds": results.seeds, "command": results.command}
    return {**results.suite, **merged}


def judge(results: Results, suite: Suite) -> Judged:
    """Each claim of the suite with its verdict."""
    return [(claim, claim.judge(results)) for claim in suite.claims]


def tally(judged: Judged) -> str:
    """ "3 of 6 claims held, 1 not held, 2 inconclusive (1 not measured); 2 reported"."""
    counts = Counter(shown_status(claim, verdict) for claim, verdict in judged)
    total = len(judged) - counts["reported"]
    parts = [f"{counts['held']} of {total} claims held"]
    parts += [f"{counts[s]} {s}" for s in ("not held", "inconclusive") if counts[s]]
    nothing = sum(shown_status(c, v) == "inconclusive" and not v.n for c, v in judged)
    if nothing:
        parts[-1] += f" ({nothing} not measured)"
    text = ", ".join(parts) if total else "No claims to judge"
    return f"{text}; {counts['reported']} reported" if counts["reported"] else text


def provenance(results: Results) -> dict[str, str]:
    """Where the numbers come from; several values where runs disagree."""
    info = {
        "command": results.command,
        "experiment": str(results.suite.get("experiment", "")),
        "device": _distinct(results, "device"),
        "commit": _distinct(results, "commit"),
        "versions": _distinct(results, "versions"),
        "data": _distinct(results, "data.name"),
        "data fingerprint": _distinct(results, "data.fingerprint"),
        "domains": _distinct(results, "data.domains"),
        "seeds": ", ".join(map(str, sorted({run.seed for run in results.runs}))),
        "finished runs": f"{len(results.runs)} of {len(results.runs) + len(results.incomplete)}",
    }
    return {key: value for key, value in info.items() if value}


def _title(results: Results) -> str:
    return f"Comparison: {results.name}"


def _scale(results: Results) -> str:
    return f"Scale: {results.scale}" if results.scale else ""


def _conditions(results: Results) -> list[str]:
    """What the arms have in common, what their size can show, and how they were tuned."""
    texts = {
        "Matched": results.suite.get("matched", ""),
        "What this scale can show": results.suite.get("limits", ""),
        "Learning rates": learning_rates(results),
    }
    return [f"{label}: {text}." for label, text in texts.items() if text]


def _text(results: Results, judged: Judged, tables: Sequence[Table]) -> str:
    head = [_title(results), results.question, tally(judged)]
    warnings = [f"! {line}" for line in caveats(results)]
    blocks = ["\n".join(filter(None, [*head, *warnings])), *map(terminal, tables)]
    return "\n\n".join(blocks) + "\n"


def _markdown(
    results: Results, judged: Judged, tables: Sequence[Table], figures: Sequence[Figure]
) -> str:
    config = [table for table in tables if table.name == "config"]
    parts = [f"# {_title(results)}", results.question, _scale(results), *_conditions(results)]
    parts.append(f"**{tally(judged)}**")
    parts += ["\n".join(f"> - {line}" for line in caveats(results))]
    parts += [markdown(table) for table in tables if table not in config]
    for figure in figures:
        parts.append(f"### {figure.title}\n\n![{figure.alt}](figures/{figure.name}.png)")
        parts.append(figure.caption)
    parts += [markdown(table) for table in config]
    parts.append("### Variants\n\n" + _bullets(results.variants))
    parts.append("### Provenance\n\n" + _bullets(provenance(results)))
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _html(
    results: Results, judged: Judged, tables: Sequence[Table], figures: Sequence[Figure]
) -> str:
    return page(
        title=_title(results),
        question=results.question,
        scale=_scale(results),
        conditions=_conditions(results),
        tally=tally(judged),
        caveats=caveats(results),
        tables=tables,
        figures=figures,
        descriptions=results.variants,
        provenance=provenance(results),
    )


def _summary(results: Results, judged: Judged, tables: Sequence[Table]) -> dict[str, Any]:
    verdicts = [
        {
            **{"id": c.id, "statement": c.statement, "source": c.source, "strength": c.strength},
            **{"status": v.status, "effect": v.effect, "half_width": v.half_width},
            **{"n": v.n, "margin": v.margin, "text": v.text},
        }
        for c, v in judged
    ]
    runs = [archived(run) for run in results.runs]
    return jsonable(
        {
            **{"name": results.name, "scale": results.scale, "question": results.question},
            **{"variants": results.variants, "baseline": results.baseline},
            **{"conditions": _conditions(results), "suite": results.suite},
            **{"tally": tally(judged), "caveats": caveats(results)},
            **{"incomplete": results.incomplete, "provenance": provenance(results)},
            **{"verdicts": verdicts, "tables": {t.name: t.to_json() for t in tables}, "runs": runs},
        }
    )


def _distinct(results: Results, key: str) -> str:
    values = [lookup(run.info, key) for run in results.runs]
    return "; ".join(dict.fromkeys(_plain(value) for value in values if value))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in flatten(value).items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _bullets(entries: dict[str, str]) -> str:
    return "\n".join(
        f"- **{key}**" + (f": {' '.join(v.split())}" if v else "") for key, v in entries.items()
    )
