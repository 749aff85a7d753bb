"""An analysis as figures. Each function draws one and returns None where there is nothing to
draw."""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes

from moejax.analysis.counting import Measured
from moejax.analyzing.subject import Analysed
from moejax.analyzing.tables import TOLD
from moejax.reporting.figures import (
    BASELINE_COLOUR,
    COLOURS,
    Figure,
    canvas,
    legend_above,
    name_axes,
    png,
    style_context,
)
from moejax.reporting.heatmaps import fair_share, heat, load_bar, panels

SHOWN_LAYERS = 6


def all_figures(found: Analysed) -> list[Figure]:
    """Every figure that the analysis can fill, in reading order."""
    drawers: tuple[Callable[[Analysed], Figure | None], ...] = (
        *(load_figure, domains_figure, specialisation_figure, repetition_figure),
        *(predictability_figure, coactivation_figure, saturation_figure, ablation_figure),
    )
    with style_context():
        return [figure for drawer in drawers if (figure := drawer(found)) is not None]


def load_figure(found: Analysed) -> Figure:
    """Load by layer and expert: of all text, and of each domain."""
    domains = found.measures.domains
    loads = {"all text": found.measures.load.load_LE}
    loads |= {
        name: domains.load_GLE[g] for g, name in enumerate(domains.names) if domains.token_G[g]
    }
    figure, axes = panels(len(loads), 1.9)
    for panel, (name, load_LE) in zip(axes, loads.items(), strict=True):
        image = heat(panel, fair_share(load_LE))
        name_axes(panel, name, "expert", "layer")
        _name_places(panel.set_yticks, [str(layer) for layer in found.measures.meta.layers])
    load_bar(figure, image, axes)
    return Figure(
        "load",
        "Load of every expert, by layer and domain",
        "Assignments of each expert relative to its fair share. White is balance, red is "
        "overloaded, blue starved. Columns that are red in one domain and blue in another are "
        "experts that the domains divide among them.",
        f"Heat maps of expert load, layers by experts: {', '.join(loads)}",
        png(figure),
    )


def domains_figure(found: Analysed) -> Figure | None:
    """Who serves which domain, a panel for some of the layers."""
    domains = found.measures.domains
    there = np.flatnonzero(domains.token_G)
    if len(there) < 2:
        return None
    layers = _some_layers(found)
    figure, axes = panels(len(layers), 1.0 + 0.25 * len(there))
    share_GLE = domains.share_GLE()[there]
    fair_L = found.measures.load.mean_size_L / domains.experts
    for panel, layer in zip(axes, layers, strict=True):
        image = heat(panel, share_GLE[:, layer] / max(float(fair_L[layer]), 1e-9))
        name_axes(panel, f"layer {found.measures.meta.layers[layer]}", "expert", "")
        panel.set_yticks(range(len(there)), [domains.names[g] for g in there])
    load_bar(figure, image, axes, "by chance")
    return Figure(
        "domains",
        "Specialisation by domain",
        "Share of a domain's tokens that an expert gets, relative to K / E, which is what chance "
        "gives. Domains are alike where a column has one colour.",
        "Heat maps of domains by experts, one for each layer shown",
        png(figure),
    )


def specialisation_figure(found: Analysed) -> Figure:
    names = ("domains", "vocabulary_input", "vocabulary_target", "vocabulary_predicted")
    return _beside_floors(
        *(found, "specialisation", "Specialisation by layer", names),
        "By domain: distance between a domain's use of the experts and that of all text. By id: "
        "share of a token's experts that another occurrence of the id has too; 1 = the id decides.",
    )


def repetition_figure(found: Analysed) -> Figure:
    return _beside_floors(
        *(found, "repetition", "Repetition by layer", ("repetition_first", "repetition_any")),
        "How often a token goes where the one before it went. Above the dotted line: the order of "
        "the tokens. Between dotted and dashed: uneven loads, and documents that use few experts.",
    )


def predictability_figure(found: Analysed) -> Figure | None:
    if len(found.measures.meta.layers) < 2:
        return None
    return _beside_floors(
        *(found, "predictability", "From layer to layer", ("predictability", "information")),
        "What a layer's first choice says about the next one's. Left, how often a table made from "
        "half of the documents is right about the other half.",
    )


def coactivation_figure(found: Analysed) -> Figure | None:
    """n_ij / n_i relative to chance, a panel for some of the layers."""
    coactivation = found.measures.coactivation
    chance_L = coactivation.strongest().random
    layers = [layer for layer in _some_layers(found) if chance_L[layer] > 0]
    if not layers:
        return None
    figure, axes = panels(len(layers), 2.9)
    for panel, layer in zip(axes, layers, strict=True):
        share_EE = coactivation.share_LEE[layer] / chance_L[layer]
        np.fill_diagonal(share_EE, 1.0)
        image = heat(panel, np.nan_to_num(share_EE))
        name_axes(panel, f"layer {found.measures.meta.layers[layer]}", "partner", "expert")
    load_bar(figure, image, axes, "by chance")
    return Figure(
        "coactivation",
        "Experts that work together",
        "Of the tokens of an expert (row), the share that has the partner (column) too, over all "
        "pairs of a token's experts, relative to chance, (K - 1) / (E - 1). A red column is an "
        "expert that is busy with everybody; a red cell off such columns, a pair.",
        "Heat maps of expert by expert, one for each layer shown",
        png(figure),
    )


def saturation_figure(found: Analysed) -> Figure | None:
    """Over the checkpoints, a line for some of the layers."""
    if not found.saturation:
        return None
    steps = list(found.saturation)
    value_SL = np.stack([figure.value for figure in found.saturation.values()])
    random_S = [float(np.nanmean(figure.random)) for figure in found.saturation.values()]
    figure, axes = canvas(1, 1, 6.5, 3.4)
    panel = axes[0, 0]
    for i, layer in enumerate(_some_layers(found)):
        label = f"layer {found.measures.meta.layers[layer]}"
        panel.plot(steps, value_SL[:, layer], "o-", color=COLOURS[i], label=label, ms=3)
    panel.plot(steps, random_S, "--", color=BASELINE_COLOUR, label="by chance")
    panel.set_ylim(0, 1)
    name_axes(panel, "", "step", "common with the analysed step")
    legend_above(figure, [panel])
    return Figure(
        "saturation",
        "How early the router settles",
        "Share of the analysed step's assignments that each earlier checkpoint made too, on the "
        "same tokens.",
        f"Lines of saturation over the steps {', '.join(map(str, steps))}",
        png(figure),
    )


def ablation_figure(found: Analysed) -> Figure | None:
    """Bits per byte without an expert: by what is taken away everywhere, and by layer."""
    if found.ablation is None:
        return None
    ablation, layers = found.ablation, found.measures.meta.layers
    whole = ablation["whole"]
    figure, axes = canvas(1, 2, 10, 3.4)
    everywhere = {f"choice {rank}": cost for rank, cost in enumerate(ablation["rank"])}
    everywhere |= {"random choice": ablation["chosen"], "not chosen": ablation["other"]}
    colours = [COLOURS[0]] * len(ablation["rank"]) + [BASELINE_COLOUR] * 2
    costs = [cost - whole for cost in everywhere.values()]
    axes[0, 0].bar(list(everywhere), costs, color=colours)
    axes[0, 0].tick_params(axis="x", rotation=20)
    name_axes(axes[0, 0], "taken away in all layers", "", "more bits per byte")
    kinds = {"rank_0": "choice 0", "chosen": "random choice", "other": "not chosen"}
    for i, (name, label) in enumerate(kinds.items()):
        cost_L = np.array(ablation[f"{name}_layer"]) - whole
        colour, dash = (COLOURS[0], "o-") if i == 0 else (BASELINE_COLOUR, ("o--", "o:")[i - 1])
        axes[0, 1].plot(range(len(layers)), cost_L, dash, color=colour, label=label, ms=3)
    name_axes(axes[0, 1], "taken away in one layer", "layer", "more bits per byte")
    _name_places(axes[0, 1].set_xticks, [str(layer) for layer in layers])
    axes[0, 1].legend()
    return Figure(
        "ablation",
        "Without one expert of each token",
        "What held-out text costs more when the router chooses anew without one of a token's "
        "experts. Grey: controls, a random one of its experts, and of those it has not.",
        "Bars by rank of choice and lines by layer of the additional bits per byte",
        png(figure),
    )


def _beside_floors(
    found: Analysed, name: str, title: str, names: tuple[str, ...], caption: str
) -> Figure:
    """A panel a measure: its value by layer, chance dashed, the control dotted."""
    measured = found.measures.figures()
    figures = {n: measured[n] for n in names if n in measured}
    figure, axes = canvas(1, len(figures), min(11, 1 + 3.2 * len(figures)), 3.2)
    for panel, (n, figured) in zip(axes[0], figures.items(), strict=True):
        _floors(panel, found.measures.meta.layers, figured)
        name_axes(panel, TOLD[n][0], "layer", "")
    legend_above(figure, list(axes[0]))
    labels = ", ".join(TOLD[n][0] for n in figures)
    return Figure(
        name, title, caption, f"Lines by layer of {labels}, with their floors", png(figure)
    )


def _floors(panel: Axes, layers: tuple[int, ...], measured: Measured) -> None:
    """Of each layer, or where a value is missing for the last one, of each step to the next."""
    places = range(measured.value.size)
    panel.plot(places, measured.value, "o-", color=COLOURS[0], label="measured", ms=3)
    panel.plot(places, measured.random, ".--", color=BASELINE_COLOUR, label="by chance", ms=3)
    if measured.shuffled is not None:
        panel.plot(places, measured.shuffled, ".:", color=COLOURS[1], label="shuffled", ms=3)
    panel.set_ylim(bottom=0)
    names = [str(layer) for layer in layers]
    if len(places) < len(layers):
        names = [f"{a} → {b}" for a, b in zip(names[:-1], names[1:], strict=True)]
    _name_places(panel.set_xticks, names)


def _some_layers(found: Analysed) -> list[int]:
    """The places of at most SHOWN_LAYERS layers, the first and the last among them."""
    layers = len(found.measures.meta.layers)
    shown = min(layers, SHOWN_LAYERS)
    return sorted({round(i * (layers - 1) / max(1, shown - 1)) for i in range(shown)})


def _name_places(set_ticks: Callable[..., object], names: list[str]) -> None:
    """Ticks at 0, 1, ..., at most eight of them named."""
    places = range(0, len(names), max(1, math.ceil(len(names) / 8)))
    set_ticks(places, [names[i] for i in places])
