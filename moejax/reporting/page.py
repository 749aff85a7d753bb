"""The report as one HTML file that needs no network: verdicts, tables, figures, provenance."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from .cells import Table
from .figures import DPI, Figure

MARKS = {"held": "✓", "not held": "✗", "inconclusive": "~", "reported": "·"}

STYLE_SHEET = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6470; --paper: #ffffff;
  --line: #d9dee4; --band: #f5f7f9; --link: #0a58a6;
  --good: #14713a; --bad: #b3261e; --open: #7a5b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa4af; --paper: #15181b;
  --line: #343a41; --band: #1d2125; --link: #7fb8f0;
  --good: #6fd08c; --bad: #ff8f85; --open: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
.question { font-size: 1.1rem; margin: 0 0 .3rem; }
.soft, figcaption, .notes { color: var(--soft); }
.tally { margin: 1.2rem 0 0; font-weight: 600; }
a { color: var(--link); }
nav { margin-top: .8rem; font-size: .92rem; }
nav a { margin-right: 1rem; white-space: nowrap; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .7rem; text-align: left; vertical-align: top; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--band); color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; }
th.number, td.number { text-align: right; }
td.prose { min-width: 14rem; white-space: normal; overflow-wrap: anywhere; }
.status { font-weight: 600; }
.held { color: var(--good); } .not-held { color: var(--bad); } .inconclusive { color: var(--open); }
.reported { color: var(--soft); }
.notes { font-size: .85rem; margin: .5rem 0 0; max-width: 60rem; }
.caveats { border-left: 3px solid var(--open); padding: .1rem 0 .1rem 1rem; margin: 1.2rem 0; }
.caveats ul { margin: .3rem 0; padding-left: 1.1rem; }
figure { margin: 1.4rem 0 2.2rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: .5rem;
  border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-size: .9rem; margin-top: .5rem; max-width: 60rem; }
figcaption b { color: var(--ink); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem;
  font-size: .9rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, monospace; white-space: pre-wrap; }
""".strip()


def page(
    title: str,
    question: str,
    scale: str,
    conditions: Sequence[str],
    tally: str,
    caveats: Sequence[str],
    tables: Sequence[Table],
    figures: Sequence[Figure],
    descriptions: dict[str, str],
    provenance: dict[str, str],
) -> str:
    """The whole document. The verdict table comes first, the config table after the figures."""
    first = [table for table in tables if table.name != "config"]
    last = [table for table in tables if table.name == "config"]
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="question">{escape(question)}</p>',
        f'<p class="soft">{escape(scale)}</p>' if scale else "",
        *(f'<p class="soft">{escape(text)}</p>' for text in conditions),
        f'<p class="tally">{escape(tally)}</p>',
        _navigation(tables, figures),
        _caveats(caveats),
        *map(_table, first[:1]),
        _descriptions(descriptions),
        *map(_table, first[1:]),
        '<section id="figures"><h2>Figures</h2>' if figures else "",
        *map(_figure, figures),
        "</section>" if figures else "",
        *map(_table, last),
        '<section id="provenance"><h2>Provenance</h2>',
        _definitions(provenance),
        "</section>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{STYLE_SHEET}\n</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _navigation(tables: Sequence[Table], figures: Sequence[Figure]) -> str:
    targets = [(f"table-{t.name}", t.title) for t in tables]
    targets += [("figures", "Figures")] if figures else []
    targets.append(("provenance", "Provenance"))
    links = "".join(f'<a href="#{target}">{escape(name)}</a>\n' for target, name in targets)
    return f'<nav aria-label="Contents">\n{links}</nav>'


def _caveats(caveats: Sequence[str]) -> str:
    if not caveats:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in caveats)
    return f'<aside class="caveats"><b>Read with care</b><ul>{items}</ul></aside>'


def _descriptions(descriptions: dict[str, str]) -> str:
    told = {name: text for name, text in descriptions.items() if text}
    return f'<section id="variants"><h2>Variants</h2>{_definitions(told)}</section>' if told else ""


def _definitions(entries: dict[str, str]) -> str:
    rows = "\n".join(
        f"<dt>{escape(k)}</dt><dd><code>{escape(v)}</code></dd>"
        if "\n" in v or k == "command"
        else f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>"
        for k, v in entries.items()
    )
    return f"<dl>\n{rows}\n</dl>"


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_class(column.right)}>{escape(column.label)}</th>'
        for column in table.columns
    )
    rows = "\n".join(f"<tr>{_row(table, texts)}</tr>" for texts in table.texts())
    notes = "".join(f'<p class="notes">{escape(note)}</p>' for note in table.notes)
    return (
        f'<section id="table-{table.name}"><h2>{escape(table.title)}</h2>\n'
        f'<div class="scroll" role="region" aria-label="{escape(table.title)}" tabindex="0">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>{notes}</section>"
    )


def _row(table: Table, texts: Sequence[str]) -> str:
    cells = [f'<th scope="row">{escape(texts[0])}</th>']
    for column, text in zip(table.columns[1:], texts[1:], strict=True):
        if column.label == "verdict" and text in MARKS:
            kind = text.replace(" ", "-")
            mark = f'<span aria-hidden="true">{MARKS[text]}</span>'
            cells.append(f'<td class="status {kind}">{mark} {escape(text)}</td>')
        elif column.format == "prose":
            cells.append(f'<td class="prose">{escape(text)}</td>')
        else:
            cells.append(f"<td{_class(column.right)}>{escape(text)}</td>")
    return "".join(cells)


def _class(right: bool) -> str:
    return ' class="number"' if right else ""


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    width = 100 * int.from_bytes(figure.png[16:20], "big") // DPI  # 100 CSS pixels an inch
    return (
        f'<figure id="figure-{figure.name}"><img alt="{escape(figure.alt)}" '
        f'width="{width}" '
        f'src="data:image/png;base64,{data}">\n'
        f"<figcaption><b>{escape(figure.title)}.</b> {escape(figure.caption)}</figcaption></figure>"
    )
