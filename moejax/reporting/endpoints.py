"""Where every arm ended: its loss against the baseline's, and its loss over its balance."""

from __future__ import annotations

import math

from matplotlib.axes import Axes

from .figures import Figure, canvas, colours, name_axes, png
from .paired import estimate
from .results import Results
from .tables import label, values


def endpoint_figure(results: Results) -> Figure | None:
    """Two panels; None with fewer than two arms beside each other."""
    gaps = _gaps(results)
    if len(gaps) < 2:
        return None
    balance = _balance(results)
    figure, axes = canvas(1, 2 if balance else 1, 10 if balance else 6, 1.4 + 0.24 * len(gaps))
    for i, (variant, mean, half_width) in enumerate(gaps.values()):
        colour = colours(results)[variant][0]
        reach = half_width if math.isfinite(half_width) else None
        axes[0, 0].errorbar(mean, i, xerr=reach, fmt="o", color=colour, capsize=3, ms=5, lw=1.5)
        axes[0, 0].annotate(f"{mean:+.3f}", (mean, i), (0, 5), textcoords="offset points", size=7)
    axes[0, 0].set_yticks(range(len(gaps)), list(gaps))
    axes[0, 0].invert_yaxis()
    axes[0, 0].locator_params(axis="x", nbins=6)
    axes[0, 0].margins(x=0.12)
    axes[0, 0].axvline(0, color="#6b6b6b", lw=1)
    name_axes(axes[0, 0], "Loss at the end", f"{results.unit} against {results.baseline}", "")
    if balance:
        _draw_balance(axes[0, 1], results, balance)
    told = ", ".join(f"{name} {mean:+.4f}" for name, (_, mean, _) in gaps.items())
    return Figure(
        "endpoints",
        "Where the arms end",
        f"Left: the difference to {results.baseline}, paired by seed, with its one-sided 95 % half "
        "width: where the bar crosses 0, the two are not told apart."
        + (
            " Right: further left is better balanced, further down has the lower loss; the dotted "
            "line is the MaxVio of random routing."
            if balance
            else ""
        ),
        f"{results.unit} against {results.baseline}: {told}.",
        png(figure),
    )


def _gaps(results: Results) -> dict[str, tuple[str, float, float]]:
    """Label -> (variant, mean difference to the baseline, half width)."""
    base = results.of(results.baseline)
    found = {}
    for variant, runs in results.finished():
        pairs = [
            (r.value("eval.bpb"), base[r.seed].value("eval.bpb")) for r in runs if r.seed in base
        ]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if variant != results.baseline and differences and all(map(math.isfinite, differences)):
            d = estimate(differences)
            found[label(variant, runs)] = (variant, d.mean, d.half_width)
    return found


def _balance(results: Results) -> dict[str, tuple[float, float]]:
    """Variant -> (MaxVio over the evaluation set, bits per byte), of arms whose load is not even by
    design."""
    found = {}
    for variant, runs in results.finished():
        vio, bpb = values(runs, "eval.max_vio_global"), values(runs, "eval.bpb")
        if vio and bpb and sum(vio) > 0 and math.isfinite(sum(bpb)):
            found[variant] = (sum(vio) / len(vio), sum(bpb) / len(bpb))
    return found if len(found) > 1 else {}


def _draw_balance(axes: Axes, results: Results, balance: dict[str, tuple[float, float]]) -> None:
    for variant, (vio, bpb) in balance.items():
        axes.plot(vio, bpb, "o", color=colours(results)[variant][0], ms=5)
        axes.annotate(variant, (vio, bpb), (4, 4), textcoords="offset points", size=7)
    floors = [x for _, runs in results.finished() for x in values(runs, "eval.max_vio_floor") if x]
    axes.axvline(min(floors, default=1e-3), color="#6b6b6b", lw=1, ls=":")
    axes.set_xscale("log")
    name_axes(axes, "Loss over balance", "MaxVio over the evaluation set", results.unit)
