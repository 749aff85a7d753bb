"""Each layer's routing over training: balance, drops, entropies, and how early choices settle."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from .figures import Figure, canvas, name_axes, png
from .heatmaps import moe_arms, panels
from .results import Results, Run

PANELS = {
    "max_vio_L": "MaxVio",
    "drop_L": "Dropped",
    "load_entropy_L": "Entropy of load",
    "router_entropy_L": "Entropy of router",
}


def layer_figure(results: Results) -> Figure | None:
    """MaxVio, drops and entropies of each layer over the training batches, first seed."""
    arms = moe_arms(results, lambda run: len(_history(run, "max_vio_L")[0]) > 1)
    if not arms:
        return None
    figure, axes = canvas(len(arms), len(PANELS), 10, 1.7 * len(arms) + 0.4)
    for row, (variant, run) in zip(axes, arms, strict=True):
        for panel, (field, title) in zip(row, PANELS.items(), strict=True):
            _lines(panel, *_history(run, field))
            name_axes(panel, title, "step", variant if field == "max_vio_L" else "")
    return Figure(
        "layers",
        "Balance and entropy of every layer over training",
        "One line a layer, dark = the lowest; one seed per arm. Layers differ: a mean over them "
        "hides one that collapses. Entropies are shares of ln E: that of the load is 1 at perfect "
        "balance, that of the router 1 where it does not care who gets a token.",
        "MaxVio, share of dropped assignments, entropy of the load and of the router over steps, "
        "by layer, one row of panels per variant: " + ", ".join(v for v, _ in arms),
        png(figure),
    )


def saturation_figure(results: Results) -> Figure | None:
    """Share of each layer's last choices that earlier evaluations made too, first seed."""
    arms = moe_arms(results, lambda run: bool(_saturation(run)))
    if not arms:
        return None
    figure, axes = panels(len(arms), 2.1)
    for panel, (variant, run) in zip(axes, arms, strict=True):
        found = _saturation(run)
        _lines(panel, np.asarray(found["step"]), np.asarray(found["saturation_SL"]), "o")
        panel.axhline(found["floor"], color="#222222", ls=":", lw=1.2, label="by chance, K / E")
        panel.set_ylim(0, 1.02)
        name_axes(panel, variant, "step", "share settled")
    at = ", ".join(f"{v} {np.mean(_saturation(run)['saturation_SL'][0]):.2f}" for v, run in arms)
    return Figure(
        "saturation",
        "How early routing settles",
        "Of the experts that tokens of the validation text are sent to at the end, the share that "
        "each layer chose at an earlier evaluation already; dark = the lowest layer, one seed per "
        "arm. Dotted: what chance gives.",
        f"Router saturation over steps, by layer. At the first evaluation: {at}.",
        png(figure),
    )


def _history(run: Run, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and a field's values by layer [steps, L]; older runs have none."""
    records = [record for record in run.train if record.get(field)]
    steps = np.asarray([record["step"] for record in records])
    return steps, np.asarray([record[field] for record in records], np.float64)


def _saturation(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = run.summary.get("saturation") or {}
    return found


def _lines(axes: Axes, steps: np.ndarray, value_SL: np.ndarray, marker: str = "") -> None:
    layers = value_SL.shape[1]
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, layers))
    for layer in range(layers):
        axes.plot(steps, value_SL[:, layer], color=shades[layer], lw=1.2, marker=marker, ms=3)
