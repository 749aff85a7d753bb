"""Load per expert as heat maps: per layer at the end, and over training for the last MoE layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.image import AxesImage

from .figures import Figure, canvas, name_axes, png
from .results import Results, Run
from .tables import is_moe


def load_figure(results: Results) -> Figure | None:
    """Load per layer and expert at the last evaluation, of the first seed."""
    arms = moe_arms(results, lambda run: _final_load(run) is not None)
    if not arms:
        return None
    figure, axes = panels(len(arms), 1.9)
    for panel, (variant, run) in zip(axes, arms, strict=True):
        load_LE = _final_load(run)
        assert load_LE is not None
        image = heat(panel, fair_share(load_LE))
        name_axes(panel, variant, "expert", "MoE layer")
        layers, experts = load_LE.shape
        panel.set_yticks(range(0, layers, math.ceil(layers / 8)))
        panel.set_xticks(range(0, experts, math.ceil(experts / 4)))
    load_bar(figure, image, axes)
    return Figure(
        "load",
        "Load of every expert",
        "Share of the evaluation tokens that each expert gets, relative to its fair share. White "
        "is balance, red is overloaded, blue starved. One seed per arm: experts have no common "
        "order across seeds.",
        "Heat maps of expert load at the last evaluation, layers by experts, one per variant: "
        + "; ".join(f"{v} {_extremes(_final_load(run))}" for v, run in arms),
        png(figure),
    )


def load_history_figure(results: Results) -> Figure | None:
    """Load per expert of the last MoE layer over the training batches, first seed."""
    arms = moe_arms(results, lambda run: len(_history(run)[0]) > 1)
    if not arms:
        return None
    figure, axes = panels(len(arms), 2.3)
    for panel, (variant, run) in zip(axes, arms, strict=True):
        steps, load_SE = _history(run)
        image = heat(panel, fair_share(load_SE).T, (float(steps[0]), float(steps[-1])))
        name_axes(panel, variant, "step", "expert")
    load_bar(figure, image, axes)
    return Figure(
        "load_history",
        "Load of the last MoE layer over training",
        "Each row is an expert. Long red or blue streaks are experts that stay over- or "
        "underused; speckle is the chance of one batch. Look at the first steps: this is where "
        "balancing acts or fails.",
        "Heat maps of the load of each expert of the last MoE layer over training, one per "
        "variant: " + ", ".join(v for v, _ in arms),
        png(figure),
    )


def moe_arms(results: Results, wanted: Callable[[Run], bool]) -> list[tuple[str, Run]]:
    """Variants with experts and their first seed's run, where it has what is wanted."""
    return [(v, runs[0]) for v, runs in results.finished() if is_moe(runs[0]) and wanted(runs[0])]


def _final_load(run: Run) -> np.ndarray | None:
    found = run.summary.get("eval", {}).get("load_LE") or (run.evals or ({},))[-1].get("load_LE")
    return np.asarray(found, np.float64) if found else None


def _history(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps and load_SE of the last layer, thinned to at most 300 columns."""
    records = [r for r in run.train if r.get("load_LE")]
    records = records[:: max(1, math.ceil(len(records) / 300))]
    steps = np.asarray([r["step"] for r in records])
    return steps, np.asarray([r["load_LE"][-1] for r in records], np.float64)


def heat(axes: Axes, share: np.ndarray, steps: tuple[float, float] | None = None) -> AxesImage:
    """log2 of the load relative to the fair share, from a quarter (blue) to four times (red)."""
    image = axes.imshow(
        np.log2(np.clip(share, 0.25, 4)),
        cmap="RdBu_r",
        vmin=-2,
        vmax=2,
        aspect="auto",
        interpolation="nearest",
        extent=(*steps, len(share) - 0.5, -0.5) if steps else None,
    )
    axes.grid(visible=False)
    return image


def fair_share(load_XE: np.ndarray) -> np.ndarray:
    """Load of each expert / mean load; 0 where nothing was routed."""
    total_X1 = load_XE.sum(axis=1, keepdims=True)
    return load_XE.shape[1] * load_XE / np.where(total_X1 > 0, total_X1, 1)


def panels(count: int, height: float) -> tuple[Canvas, list[Axes]]:
    """A figure of `count` axes of this height in inches, at most four side by side."""
    columns = math.ceil(count / math.ceil(count / 4))
    rows = math.ceil(count / columns)
    figure, axes = canvas(rows, columns, max(4.5, 10 * min(columns, 3) / 3), height * rows + 0.2)
    for panel in list(axes.flat)[count:]:
        panel.remove()
    return figure, list(axes.flat)[:count]


def load_bar(
    figure: Canvas, image: AxesImage, axes: list[Axes], middle: str = "fair share"
) -> None:
    """The scale of `heat`; `middle` says what a share of 1 is."""
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=15, ticks=[-2, -1, 0, 1, 2])
    bar.set_ticklabels(["¼ or less", "½", middle, "2×", "4× or more"])
    bar.outline.set_visible(False)


def _extremes(load_LE: np.ndarray | None) -> str:
    assert load_LE is not None
    share_LE = fair_share(load_LE)
    return f"from {share_LE.min():.2f} to {share_LE.max():.2f} of the fair share"
