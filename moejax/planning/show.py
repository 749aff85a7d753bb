"""A plan as text and as one HTML page that needs no network."""

import html
from collections.abc import Sequence
from typing import Any

from moejax.planning.result import Plan
from moejax.planning.roofline import ASSUMPTIONS
from moejax.planning.search import Try
from moejax.reporting.page import STYLE_SHEET

Table = tuple[str, tuple[str, ...], Sequence[tuple[str, ...]]]


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def big(count: float) -> str:
    """A count with a unit of thousands."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.4g}P"


def seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{1e3 * value:.3f} ms"


def tables(plan: Plan) -> list[Table]:
    """(title, columns, rows) of everything that a plan says."""
    return [_overview(plan), _memory(plan), _collectives(plan), _estimate(plan), _tensors(plan)]


def _overview(plan: Plan) -> Table:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    how = f"compiled in {plan.compile_seconds:.0f} s" if plan.compiled else "by formula"
    ratio = plan.flops / plan.model_flops
    rows = [
        ("topology", f"{plan.topology.name}, {plan.topology.chips} chips, {how}"),
        ("mesh", f"{mesh}, {plan.devices} devices"),
        ("parameters", f"{big(plan.size.total)}, {big(plan.size.active)} active"),
        ("tokens a step", f"{plan.estimate.tokens:,}"),
        ("FLOPs a device, model", big(plan.model_flops)),
        ("FLOPs a device, program", f"{big(plan.flops)} = {ratio:.3f} x model"),
    ]
    if plan.worst_flops != plan.flops:
        rows.append(("... if every buffer were full", big(plan.worst_flops)))
    return "plan", ("what", "value"), rows


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    names = {"batch": "batch, rest of the state, padding", "temporaries": "other temporaries"}
    rows = [
        (names.get(name, name), size(value), f"{100 * value / plan.hbm:.1f} %")
        for name, value in memory._asdict().items()
    ]
    rows.append(("total", size(memory.total), f"{100 * memory.total / plan.hbm:.1f} %"))
    rows.append(("device", size(plan.hbm), "100 %"))
    return "memory a device", ("kind", "bytes", "of the device"), rows


def _collectives(plan: Plan) -> Table:
    rows = [
        (
            row["kind"],
            row["axes"],
            row["pass"],
            str(row["devices"]),
            str(row["calls"]),
            size(row["bytes"]),
        )
        for row in plan.collectives
    ]
    columns = ("kind", "axes", "pass", "devices", "calls a step", "bytes a step")
    return "collectives of a device", columns, rows


def _estimate(plan: Plan) -> Table:
    e = plan.estimate
    rows = [
        ("compute", seconds(e.compute), "", ""),
        ("memory traffic", f"{seconds(e.hbm)} ({size(plan.hbm_bytes)})", "", ""),
        ("collectives", seconds(e.collectives), "", ""),
    ]
    for how, step in (("overlap", e.seconds_overlap), ("sum", e.seconds_sum)):
        tokens, mfu = e.rates(step)
        rows.append((f"step, {how}", seconds(step), f"{tokens:,.0f}", f"{100 * mfu:.1f} %"))
    return "roofline estimate", ("bound", "time", "tokens/s", "MFU"), rows


def _tensors(plan: Plan) -> Table:
    rows = [(t.shape, size(t.bytes), str(t.places), t.op_name[-70:]) for t in plan.tensors]
    return "largest tensors", ("array", "bytes", "places", "from"), rows


def tries_table(tries: list[Try]) -> Table:
    """What a search tried."""
    rows = [
        (t.change or "as given", "–" if t.needed is None else size(t.needed), t.outcome)
        for t in tries
    ]
    return "tried", ("change", "needs", "outcome"), rows


def text(found: list[Table], notes: tuple[str, ...] = ()) -> str:
    """Tables for a terminal."""
    blocks = []
    for title, columns, rows in found:
        if not rows:
            continue
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [title, "  " + _line(columns, widths)]
        lines += ["  " + _line(row, widths) for row in rows]
        blocks.append("\n".join(line.rstrip() for line in lines))
    blocks += [f"note: {note}" for note in notes]
    return "\n\n".join(blocks)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))


def page(plan: Plan, found: list[Table]) -> str:
    """The same as a page, with the assumptions."""
    title = html.escape(f"{plan.name} on {plan.topology.name}")
    parts = [f"<h1>{title}</h1>"]
    for name, columns, rows in found:
        if rows:
            parts += [f"<h2>{html.escape(name)}</h2>", _html_table(columns, rows)]
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in (*plan.notes, *ASSUMPTIONS))
    parts.append(f"<h2>assumptions</h2><ul>{listed}</ul>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE_SHEET}</style></head><body><main>{''.join(parts)}</main></body></html>"
    )


def _html_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def row(cells: Any, tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    head = row(columns, "th")
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
