"""The figures of a comparison. Each function draws one and returns None where there is nothing
to draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from .endpoints import endpoint_figure
from .figures import (
    Figure,
    canvas,
    colours,
    curve,
    draw,
    late_limits,
    legend_above,
    name_axes,
    png,
    style_context,
)
from .heatmaps import load_figure, load_history_figure
from .layers import layer_figure, saturation_figure
from .results import Results, Run
from .tables import batch_floor, domains_of, is_moe, label, random_drops, values


def all_figures(results: Results) -> list[Figure]:
    """Every figure that the results can fill, in reading order."""
    drawers: tuple[Callable[[Results], Figure | None], ...] = (
        *(endpoint_figure, loss_figure, seconds_figure, domain_figure),
        *(max_vio_figure, drop_figure, load_figure, load_history_figure),
        *(layer_figure, saturation_figure),
    )
    with style_context():
        return [figure for drawer in drawers if (figure := drawer(results)) is not None]


def loss_figure(results: Results) -> Figure | None:
    if not results.runs:
        return None
    figure, axes = canvas(1, 2, 10, 3.7)
    for variant, runs in results.finished():
        style = colours(results)[variant]
        draw(axes[0, 0], curve(runs, "loss"), label(variant, runs), style)
        draw(axes[0, 1], curve(runs, "bpb", "eval"), label(variant, runs), style)
    name_axes(axes[0, 0], "Training loss, smoothed", "step", "nats per token")
    name_axes(axes[0, 1], "Evaluation", "step", results.unit)
    for panel in axes.flat:
        late_limits(panel)
    legend_above(figure, list(axes.flat))
    final = ", ".join(f"{v} {_mean(runs, 'eval.bpb'):.4f}" for v, runs in results.finished())
    return Figure(
        "loss",
        "Loss over steps",
        "The lower curve learns more from the same tokens. Bands span the seeds: where they "
        "overlap, the order of the arms is not settled. The axes fit the last three quarters of "
        "training.",
        f"Training loss and evaluation loss over steps. Final {results.unit}: {final}.",
        png(figure),
    )


def seconds_figure(results: Results) -> Figure | None:
    figure, axes = canvas(1, 2, 10, 3.6)
    speeds = {}
    for variant, runs in results.finished():
        style = colours(results)[variant]
        found = curve(runs, "bpb", "eval", by="seconds")
        draw(axes[0, 0], found, label(variant, runs), style)
        speeds[label(variant, runs)] = _mean(runs, "train.tokens_per_s"), style[0]
    if not axes[0, 0].lines:
        return None
    rates, shades = zip(*speeds.values(), strict=True)
    axes[0, 1].barh(list(speeds), rates, color=shades, height=0.65)
    axes[0, 1].invert_yaxis()
    axes[0, 1].grid(axis="y", visible=False)
    name_axes(axes[0, 0], "Evaluation against training time", "seconds", results.unit)
    name_axes(axes[0, 1], "Training speed", "tokens per second", "")
    late_limits(axes[0, 0])
    legend_above(figure, [axes[0, 0]])
    times = ", ".join(f"{v} {_mean(runs, 'seconds'):.0f} s" for v, runs in results.finished())
    return Figure(
        "seconds",
        "Loss over time",
        "A router that wins per step may lose per second: read the curves at equal time. Seconds "
        "count training steps only, on the machine named below, without compilation and "
        "evaluation.",
        f"Evaluation loss over seconds of training, and tokens per second. Training took: {times}.",
        png(figure),
    )


def domain_figure(results: Results) -> Figure | None:
    domains = domains_of(results)
    arms = list(results.finished())
    if not domains or not arms:
        return None
    figure, axes = canvas(1, 2, 10, 3.5)
    grid = {v: [_mean(runs, f"eval.bpb_domain.{d}") for d in domains] for v, runs in arms}
    _bars(axes[0, 0], results, grid, domains)
    name_axes(axes[0, 0], "Loss by domain", "", results.unit)
    base = grid.get(results.baseline)
    if base is not None and len(grid) > 1:
        gaps = {
            v: [100 * (x / b - 1) for x, b in zip(bpb, base, strict=True)]
            for v, bpb in grid.items()
            if v != results.baseline
        }
        _bars(axes[0, 1], results, gaps, domains)
        axes[0, 1].axhline(0, color="#555555", lw=0.8)
        name_axes(axes[0, 1], f"Difference to {results.baseline}", "", "percent")
    else:
        axes[0, 1].remove()
    legend_above(figure, [axes[0, 0]])
    return Figure(
        "domains",
        "Loss by domain",
        f"Left: the level of each domain. Right: what an arm gains over {results.baseline} there "
        "(below 0 is better): experts that specialise help most where a domain stands apart. "
        "Means over seeds.",
        f"Bars of evaluation {results.unit} by domain: "
        + "; ".join(f"{v} " + _listed(domains, bpb) for v, bpb in grid.items()),
        png(figure),
    )


def max_vio_figure(results: Results) -> Figure | None:
    figure, axes = canvas(1, 2, 10, 3.6)
    for variant, runs in results.finished():
        if is_moe(runs[0]):
            style = colours(results)[variant]
            draw(axes[0, 0], curve(runs, "max_vio"), label(variant, runs), style)
            draw(axes[0, 1], curve(runs, "max_vio_global", "eval"), label(variant, runs), style)
    if not any(panel.lines for panel in axes.flat):
        return None
    _floor_lines(axes[0, 0], results, batch_floor)
    _floor_lines(axes[0, 1], results, lambda run: run.value("eval.max_vio_floor"))
    name_axes(axes[0, 0], "MaxVio of the training batch", "step", "max load / mean load - 1")
    name_axes(axes[0, 1], "MaxVio over the evaluation set", "step", "")
    for panel in axes.flat:
        _log_with_zero(panel)
    legend_above(figure, list(axes.flat))
    final = ", ".join(
        f"{v} {_mean(runs, 'eval.max_vio_global'):.3f}"
        for v, runs in results.finished()
        if is_moe(runs[0])
    )
    return Figure(
        "max_vio",
        "Load balance over steps",
        "0 is perfect balance, 1 means that the fullest expert gets twice its share; mean of the "
        "layers. The dotted line is what random routing gives by chance: differences below it "
        "cannot be told from noise.",
        "MaxVio over steps, per batch and over the evaluation set. Final, evaluation set: "
        f"{final}.",
        png(figure),
    )


def drop_figure(results: Results) -> Figure | None:
    figure, axes = canvas(1, 2, 10, 3.4)
    for variant, runs in results.finished():
        if is_moe(runs[0]):
            style = colours(results)[variant]
            for panel, field in zip(axes.flat, ("drop", "left_behind"), strict=True):
                draw(panel, curve(runs, field), label(variant, runs), style)
    if not any(np.any(np.asarray(line.get_ydata()) > 0) for p in axes.flat for line in p.lines):
        return None
    _floor_lines(axes[0, 0], results, random_drops)
    name_axes(axes[0, 0], "Dropped assignments", "step", "share of assignments")
    name_axes(axes[0, 1], "Tokens left behind", "step", "share of tokens")
    for panel in axes.flat:
        panel.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
        panel.set_ylim(bottom=0)
    legend_above(figure, list(axes.flat))
    final = ", ".join(
        f"{v} {100 * _mean(runs, 'train.drop'):.2f} %"
        for v, runs in results.finished()
        if is_moe(runs[0])
    )
    return Figure(
        "drops",
        "Dropped assignments over steps",
        "Left: choices that found their expert full. Right: tokens that no expert processed "
        "(only the residual carries them). Balance drives both down; small groups drop some even "
        "when routing is random.",
        "Share of dropped assignments and of tokens left behind over training. At the end: "
        f"{final}.",
        png(figure),
    )


def _bars(
    axes: Axes, results: Results, grid: dict[str, list[float]], domains: Sequence[str]
) -> None:
    width = 0.8 / len(grid)
    for i, (variant, heights) in enumerate(grid.items()):
        x = np.arange(len(domains)) + (i - (len(grid) - 1) / 2) * width
        colour, dash = colours(results)[variant]
        hatch = {"-": None, "--": "//", ":": "..", "-.": "xx"}[dash]
        axes.bar(x, heights, 0.92 * width, color=colour, label=variant, hatch=hatch)
    tilt = 25 if len(domains) > 4 else 0
    axes.set_xticks(range(len(domains)), domains, rotation=tilt, ha="right" if tilt else "center")
    axes.grid(axis="x", visible=False)


def _floor_lines(axes: Axes, results: Results, floor_of: Callable[[Run], float | None]) -> None:
    """What random routing gives: one black line, or one in each arm's colour where they differ."""
    floors: dict[float, str] = {}
    for variant, runs in results.finished():
        if is_moe(runs[0]) and (floor := floor_of(runs[0])):
            floors.setdefault(round(floor, 6), colours(results)[variant][0])
    for floor, colour in floors.items():
        shade = colour if len(floors) > 1 else "#222222"
        axes.axhline(floor, color=shade, ls=":", lw=1.2)
    if floors:
        axes.plot([], [], ":", color="#222222", lw=1.2, label="random routing")


def _log_with_zero(axes: Axes) -> None:
    """Logarithmic above 0.01, linear below: expert choice sits at exactly 0."""
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.4)
    ticks = [0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
    top = axes.dataLim.ymax
    axes.set_yticks([t for t in ticks if t <= 1.5 * top], minor=False)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.minorticks_off()
    axes.set_ylim(-0.0015, 1.3 * max(top, 0.01))


def _mean(runs: Sequence[Run], metric: str) -> float:
    found = values(runs, metric)
    return sum(found) / len(found) if found else math.nan


def _listed(domains: Sequence[str], numbers: Sequence[float]) -> str:
    return ", ".join(f"{d} {x:.3f}" for d, x in zip(domains, numbers, strict=True))
