"""What all figures share: colours, axes, and a matplotlib figure turned into PNG bytes without
pyplot.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from PIL import Image

from .results import Results, Run

# Wong's colours, which colour-blind readers can tell apart; the baseline is grey. After the last
# colour they begin again with another dash.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195")
BASELINE_COLOUR = "#6b6b6b"
DPI = 150
DASHES = ("-", "--", ":", "-.")

STYLE = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Figure:
    """A drawn figure: `caption` says what to see, `alt` what is there for who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    png: bytes


@dataclass(frozen=True)
class Curve:
    """Mean over seeds and the lowest and highest seed, on a common grid."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def colours(results: Results) -> dict[str, tuple[str, str]]:
    """Variant -> (colour, line style), the same in every figure."""
    others = [variant for variant in results.variants if variant != results.baseline]
    found = {results.baseline: (BASELINE_COLOUR, "-")}
    for i, variant in enumerate(others):
        found[variant] = (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)])
    return found


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Canvas, np.ndarray]:
    """A figure in inches with a rows x columns array of axes. Call inside
    `matplotlib.rc_context(STYLE)`.
    """
    figure = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def png(figure: Canvas) -> bytes:
    """A PNG of 256 colours, a third as large as one of all: a page holds a dozen."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=DPI, metadata={"Software": None})
    image = Image.open(full).convert("RGB")
    image.quantize(dither=Image.Dither.NONE).save(small, "PNG")
    return small.getvalue()


def curve(runs: Sequence[Run], field: str, kind: str = "train", by: str = "step") -> Curve | None:
    """One field of the records of several seeds, brought to the first seed's grid; smoothed if
    training.
    """
    lines = [line for run in runs if (line := _line(run, field, kind, by)) is not None]
    if not lines:
        return None
    end = min(x[-1] for x, _ in lines)
    grid = lines[0][0][lines[0][0] <= end]
    if not len(grid):
        return None
    seeds = np.stack([np.interp(grid, x, y) for x, y in lines])
    return Curve(grid, seeds.mean(0), seeds.min(0), seeds.max(0))


def _line(run: Run, field: str, kind: str, by: str) -> tuple[np.ndarray, np.ndarray] | None:
    records = run.train if kind == "train" else run.evals
    points = [(r[by], r[field]) for r in records if _finite(r.get(field)) and _finite(r.get(by))]
    if not points:
        return None
    x, y = np.asarray(points, np.float64).T
    return x, smooth(y) if kind == "train" else y


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred mean over 2 % of the points, narrower at the ends so that nothing is invented
    there.
    """
    half = max(1, len(y) // 100) if len(y) >= 20 else 0
    sums = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    reach = np.minimum(half, np.minimum(i, len(y) - 1 - i))
    return (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)


def draw(axes: Axes, found: Curve | None, label: str, style: tuple[str, str]) -> None:
    """The mean as a line, the seeds as a band."""
    if found is None:
        return
    colour, dash = style
    marker = "o" if len(found.x) <= 12 else ""
    axes.plot(found.x, found.mean, dash, color=colour, label=label, lw=1.7, marker=marker, ms=3)
    axes.fill_between(found.x, found.low, found.high, color=colour, alpha=0.15, lw=0)


def late_limits(axes: Axes, skip: float = 0.25) -> None:
    """Limit y to what is drawn after the first share of the run: the first steps would flatten
    the rest.
    """
    start, stop = axes.dataLim.intervalx
    seen = [
        y
        for line in axes.lines
        for x, y in zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True)
        if x >= start + skip * (stop - start)
    ]
    if len(seen) > 1 and max(seen) > min(seen):
        room = 0.1 * (max(seen) - min(seen))
        axes.set_ylim(min(seen) - room, max(seen) + room)


def legend_above(figure: Canvas, axes: Sequence[Axes]) -> None:
    """One legend for all panels, above them."""
    entries = {}
    for panel in axes:
        entries.update(dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True)))
    if entries:
        columns = min(len(entries), 6)
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)


def name_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and axis labels."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def style_context() -> AbstractContextManager[None]:
    """matplotlib's default style with ours on top, whatever the user's matplotlibrc says."""
    return matplotlib.style.context(["default", STYLE])
