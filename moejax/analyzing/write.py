"""An analysis to files: analysis.json, analysis.html, figures/*.png; and to the terminal."""

import json
from pathlib import Path
from typing import Any

from moejax.analyzing.figures import all_figures
from moejax.analyzing.subject import Analysed
from moejax.analyzing.tables import all_tables
from moejax.reporting.cells import jsonable, terminal
from moejax.reporting.page import page
from moejax.storage import write_atomically

QUESTION = "What did the routers learn, and what of it is more than chance?"
PAGE_ONLY = ("layers", "favourites")


def write_analysis(found: Analysed, out: Path) -> str:
    """Writes all files under `out`, each complete or not at all; returns the terminal's text."""
    tables, figures = all_tables(found), all_figures(found)
    for figure in figures:
        write_atomically(out / "figures" / f"{figure.name}.png", figure.png)
    written = json.dumps(jsonable(as_dict(found)), allow_nan=False)
    write_atomically(out / "analysis.json", written.encode() + b"\n")
    html = page(
        title=f"Analysis: {found.name}",
        question=QUESTION,
        scale="",
        conditions=[],
        tally="",
        caveats=found.caveats,
        tables=tables,
        figures=figures,
        descriptions={},
        provenance=found.provenance,
    )
    write_atomically(out / "analysis.html", html.encode())
    head = [f"{found.name}: {found.provenance['tokens']}", *(f"! {c}" for c in found.caveats)]
    blocks = [terminal(table) for table in tables if table.name not in PAGE_ONLY]
    return "\n\n".join(["\n".join(head), *blocks]) + "\n"


def as_dict(found: Analysed) -> dict[str, Any]:
    """Plain values: every figure by layer with its floor and control, and the counts they are made
    of but those by id."""
    measures = found.measures
    load, domains, meta = measures.load, measures.domains, measures.meta
    return {
        "name": found.name,
        "provenance": found.provenance,
        "caveats": found.caveats,
        "layers": meta.layers,
        "experts": meta.experts,
        "tokens": load.tokens,
        "experts_a_token": load.mean_size_L.tolist(),
        "figures": {name: _plain(figure) for name, figure in measures.figures().items()},
        "most_frequent_next": measures.predictability.most_frequent().tolist(),
        "load_LE": load.load_LE.tolist(),
        "kept_LE": load.kept_LE.tolist(),
        "sizes_LX": load.size_LX.tolist(),
        "starved": load.starved().tolist(),
        "domains": dict(zip(domains.names, domains.token_G.tolist(), strict=True)),
        "load_GLE": domains.load_GLE.tolist(),
        "together_LEE": measures.coactivation.together_LEE.tolist(),
        "saturation": {step: _plain(figure) for step, figure in found.saturation.items()},
        "ablation": found.ablation,
    }


def _plain(figure: Any) -> dict[str, Any]:
    kept = {name: a for name, a in figure._asdict().items() if a is not None}
    return {name: a.tolist() for name, a in kept.items()}
