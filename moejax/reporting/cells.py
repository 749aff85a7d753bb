"""A table as data: raw cells, a format per column, and its rendering as plain text or Markdown.

A cell is None, a string, a number, or [mean, spread]. `to_json` keeps the raw cells, so that the
printed table can be derived again from the file.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Cell = None | str | float | list[float | None]

WIDTH = 120
ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """`format` names one of FORMATS; a "prose" column takes the width that is left and wraps."""

    label: str
    format: str = "text"

    @property
    def right(self) -> bool:
        return self.format not in ("text", "prose", "any")


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.name}: {len(row)} cells, {len(self.columns)} columns"
                )

    def texts(self) -> list[list[str]]:
        """The formatted cells."""
        formats = [column.format for column in self.columns]
        return [[show(c, f) for c, f in zip(row, formats, strict=True)] for row in self.rows]

    def without_empty_columns(self) -> Table:
        """Columns in which no row has a value say nothing."""
        keep = [i for i in range(len(self.columns)) if any(row[i] is not None for row in self.rows)]
        columns = tuple(self.columns[i] for i in keep)
        rows = tuple(tuple(row[i] for i in keep) for row in self.rows)
        return Table(self.name, self.title, columns, rows, self.notes)

    def to_json(self) -> dict[str, Any]:
        return jsonable(asdict(self))

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Table:
        columns = tuple(Column(**column) for column in found["columns"])
        rows = tuple(tuple(row) for row in found["rows"])
        return cls(found["name"], found["title"], columns, rows, tuple(found["notes"]))


def jsonable(value: Any) -> Any:
    """Strict JSON: not-a-number and infinities, which JSON cannot write, become the strings they
    print as.
    """
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def show(cell: Cell, format: str) -> str:
    """The text of a cell: ABSENT for None, "mean ± spread" for a pair."""
    if cell is None:
        return ABSENT
    if isinstance(cell, str):
        return cell
    write = FORMATS[format]
    if not isinstance(cell, list):
        return write(cell) if math.isfinite(cell) else str(cell)
    mean, spread = cell
    if not isinstance(spread, int | float) or not math.isfinite(spread):
        return show(mean, format)
    return f"{show(mean, format)} ± {write(spread).lstrip('+')}"


def _si(value: float) -> str:
    """1_234_567 -> 1.23M, three digits."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


FORMATS: dict[str, Callable[[float], str]] = {
    "text": lambda x: f"{x:g}",
    "prose": lambda x: f"{x:g}",
    "any": lambda x: f"{x:g}",
    "integer": lambda x: f"{x:,.0f}",
    "si": _si,
    "bpb": lambda x: f"{x:.4f}",
    "signed": lambda x: f"{x:+.4f}",
    "percent": lambda x: f"{100 * x:.2f} %" if abs(x) < 0.1 else f"{100 * x:.1f} %",
    "ratio": lambda x: f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}",
    "rate": lambda x: f"{x:.2e}".replace("e-0", "e-"),
    "bytes": lambda x: f"{x / 1e6:,.0f} MB",
    "seconds": lambda x: f"{x:,.0f} s" if x >= 100 else f"{x:.3g} s",
}


def terminal(table: Table, width: int = WIDTH) -> str:
    """Aligned text no wider than `width`: long tables continue below with their first column
    repeated.
    """
    parts = [table.title, *(_block(table, part, width) for part in _split(table, width))]
    for note in table.notes:
        parts.append(textwrap.fill(note, width, initial_indent="  ", subsequent_indent="  "))
    return "\n".join(parts)


def markdown(table: Table) -> str:
    """A GitHub table under a heading; pipes in cells are escaped."""
    lines = [f"### {table.title}", ""]
    lines.append("| " + " | ".join(_escape(c.label) for c in table.columns) + " |")
    lines.append("|" + "|".join(" ---: " if c.right else " --- " for c in table.columns) + "|")
    lines += ["| " + " | ".join(_escape(t) for t in row) + " |" for row in table.texts()]
    for note in table.notes:
        lines += ["", _escape(note)]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _widths(table: Table) -> list[int]:
    texts = table.texts()
    return [max(len(c.label), *(len(t[i]) for t in texts), 1) for i, c in enumerate(table.columns)]


def _split(table: Table, width: int) -> list[list[int]]:
    """Column indices per block; a prose column asks only for a readable 40 characters."""
    widths = [
        min(w, 40) if c.format == "prose" else w
        for w, c in zip(_widths(table), table.columns, strict=True)
    ]
    blocks: list[list[int]] = [[0]]
    for i in range(1, len(widths)):
        used = sum(widths[j] + 2 for j in blocks[-1])
        if used + widths[i] > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(i)
    return blocks


def _block(table: Table, columns: Sequence[int], width: int) -> str:
    widths = {i: w for i, w in enumerate(_widths(table)) if i in columns}
    prose = [i for i in columns if table.columns[i].format == "prose"]
    fixed = sum(w for i, w in widths.items() if i not in prose) + 2 * (len(columns) - 1)
    for done, i in enumerate(prose):
        widths[i] = max(12, min(widths[i], (width - fixed) // (len(prose) - done)))
        fixed += widths[i]
    header = [_line([table.columns[i].label for i in columns], table, columns, widths)]
    header.append("  ".join("─" * widths[i] for i in columns))
    rows = [_wrapped([row[i] for i in columns], table, columns, widths) for row in table.texts()]
    return "\n".join([*header, *rows])


def _wrapped(texts: list[str], table: Table, columns: Sequence[int], widths: dict[int, int]) -> str:
    pieces = [textwrap.wrap(t, widths[i]) or [""] for t, i in zip(texts, columns, strict=True)]
    height = max(map(len, pieces))
    lines = [[p[h] if h < len(p) else "" for p in pieces] for h in range(height)]
    return "\n".join(_line(line, table, columns, widths) for line in lines)


def _line(texts: list[str], table: Table, columns: Sequence[int], widths: dict[int, int]) -> str:
    cells = [
        t.rjust(widths[i]) if table.columns[i].right else t.ljust(widths[i])
        for t, i in zip(texts, columns, strict=True)
    ]
    return "  ".join(cells).rstrip()
