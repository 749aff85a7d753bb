"""An analysis as tables: every figure beside its floor, then by layer, domain, checkpoint."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from moejax.analyzing.subject import Analysed
from moejax.reporting.cells import Cell, Column, Table

# Figure: what its row is called, and what it says.
TOLD = {
    "max_vio": ("MaxVio", "busiest expert's load / mean load - 1; all tokens together"),
    "cv": ("CV of the load", "standard deviation / mean"),
    "load_entropy": ("load entropy", "of the load, / ln E; 1 = even"),
    "dead": ("dead experts", "share of experts that no token chose"),
    "domains": (
        "specialisation by domain",
        "distance of a domain's shares of the experts from all",
    ),
    "vocabulary_input": (
        "specialisation by input id",
        "share of a token's experts that its id has elsewhere",
    ),
    "vocabulary_target": ("specialisation by target id", "the same for the id that follows"),
    "vocabulary_predicted": (
        "specialisation by predicted id",
        "the same for the model's best guess",
    ),
    "coactivation": ("strongest partner", "of an expert's tokens, those that its partner has too"),
    "repetition_first": ("repeats first choice", "of the token before it in the document"),
    "repetition_any": ("repeats any expert", "at least one expert of the token before it"),
    "predictability": ("next layer predicted", "held-out accuracy of a table of first choices"),
    "information": ("information on it", "mutual information of the choices / entropy"),
}
SHOWN_FAVOURITES, LEAST_OCCURRENCES = 6, 10


def all_tables(found: Analysed) -> list[Table]:
    """Every table that the analysis can fill, in reading order."""
    makers = (measures_table, domains_table, saturation_table, ablation_table)
    tables = [table for maker in makers if (table := maker(found)) is not None]
    return [*tables, layers_table(found), *favourites_tables(found)]


def measures_table(found: Analysed) -> Table:
    """Means over layers."""
    rows: list[tuple[Cell, ...]] = []
    figures = found.measures.figures()
    for name, (label, told) in TOLD.items():
        if name in figures and figures[name].value.size:
            value, random, shuffled = figures[name]
            control = None if shuffled is None else _mean(shuffled)
            span = f"{np.nanmin(value):.3f} to {np.nanmax(value):.3f}" if value.size > 1 else None
            rows.append((label, _mean(value), _mean(random), control, span, told))
    load = found.measures.load
    return Table(
        "measures",
        "Routing beside chance",
        (
            Column("measure"),
            *(Column(name, "ratio") for name in ("mean", "by chance", "shuffled")),
            Column("by layer"),
            Column("what it is", "prose"),
        ),
        tuple(rows),
        (
            f"Means over layers; {load.tokens:,} tokens, {_mean(load.mean_size_L):.3g} of "
            f"{load.experts} experts a token. By chance: every token draws its experts uniformly. "
            "Shuffled: the same routing with documents' labels, ids, partners or the order in the "
            "document dealt anew.",
        ),
    )


def layers_table(found: Analysed) -> Table:
    """Load by layer, and each figure that a layer has."""
    load, figures = found.measures.load, found.measures.figures()
    shown = {
        **{"experts a token": load.mean_size_L, "MaxVio": figures["max_vio"].value},
        **{"by chance": figures["max_vio"].random, "dead": figures["dead"].value},
        **{"starved": load.starved(), "dropped": load.dropped()},
    }
    shown |= {
        label: figures[name].value
        for name, label in (
            *(("domains", "by domain"), ("vocabulary_input", "by id")),
            *(("coactivation", "partner"), ("repetition_first", "repeats")),
        )
        if name in figures
    }
    rows: list[tuple[Cell, ...]] = [
        (str(layer), *(float(column[i]) for column in shown.values()))
        for i, layer in enumerate(found.measures.meta.layers)
    ]
    columns = (Column("layer"), *(Column(name, "ratio") for name in shown))
    note = (
        "Starved: share of experts with less than 1 % of the mean load. Dropped: of assignments. "
        "The rest as above."
    )
    return Table("layers", "By layer", columns, tuple(rows), (note,))


def domains_table(found: Analysed) -> Table | None:
    domains = found.measures.domains
    there = [g for g, tokens in enumerate(domains.token_G) if tokens]
    if not there:
        return None
    vio_GL, floor_GL = domains.max_vio()
    share_GLE = domains.share_GLE()
    rows: list[tuple[Cell, ...]] = []
    for g in there:
        layer, expert = np.unravel_index(share_GLE[g].argmax(), share_GLE[g].shape)
        most = f"{expert} of layer {found.measures.meta.layers[layer]}"
        tokens, share = float(domains.token_G[g]), float(share_GLE[g, layer, expert])
        rows.append((domains.names[g], tokens, _mean(vio_GL[g]), _mean(floor_GL[g]), most, share))
    columns = (
        *(Column("domain"), Column("tokens", "integer"), Column("MaxVio", "ratio")),
        *(Column("by chance", "ratio"), Column("its busiest expert")),
        Column("share of its tokens", "percent"),
    )
    return Table("domains", "By domain", columns, tuple(rows))


def saturation_table(found: Analysed) -> Table | None:
    if not found.saturation:
        return None
    rows = tuple(
        (str(step), _mean(figure.value), _mean(figure.random))
        for step, figure in found.saturation.items()
    )
    columns = (Column("step"), Column("saturation", "ratio"), Column("by chance", "ratio"))
    note = "Share of the analysed step's assignments that the earlier one made too; mean of layers."
    return Table("saturation", "How early the router settles", columns, rows, (note,))


def ablation_table(found: Analysed) -> Table | None:
    if found.ablation is None:
        return None
    ablation, layers = found.ablation, found.measures.meta.layers
    whole = ablation["whole"]

    def cases() -> Iterator[tuple[str, float]]:
        for rank, cost in enumerate(ablation["rank"]):
            yield f"choice {rank}, in all layers", cost
        yield "a random choice, in all layers", ablation["chosen"]
        yield "a random expert not chosen, in all layers", ablation["other"]
        for layer, cost in zip(layers, ablation["rank_0_layer"], strict=True):
            yield f"choice 0, in layer {layer}", cost

    rows: list[tuple[Cell, ...]] = [("nothing", whole, None)]
    rows += [(name, cost, cost - whole) for name, cost in cases()]
    columns = (Column("taken away"), Column("bits per byte", "bpb"), Column("more", "signed"))
    note = "The router chooses anew without it; choice 0 is a token's best expert."
    return Table("ablation", "Without one expert of each token", columns, tuple(rows), (note,))


def favourites_tables(found: Analysed) -> list[Table]:
    """The ids that most surely go to each expert, one table for input ids of the last layer."""
    vocabulary = found.measures.vocabulary["input"]
    if found.decode is None or not vocabulary.count_V.sum():
        return []
    last = len(found.measures.meta.layers) - 1
    rows = []
    for expert in range(found.measures.meta.experts):
        ids = vocabulary.favourites(last, expert, SHOWN_FAVOURITES, LEAST_OCCURRENCES)
        text = ", ".join(f"{_shown(found.decode, v)} {100 * share:.0f} %" for v, share in ids)
        rows.append((str(expert), text or None))
    return [
        Table(
            "favourites",
            f"Ids of each expert, layer {found.measures.meta.layers[last]}",
            (Column("expert"), Column("share of the id's occurrences that go there", "prose")),
            tuple(rows),
            (f"Input ids that occur at least {LEAST_OCCURRENCES} times.",),
        )
    ]


def _shown(decode: Callable[[Iterable[int]], str], v: int) -> str:
    """The text of an id; its number where it is a part of a character."""
    text = decode([v])
    return f"id {v}" if "\N{REPLACEMENT CHARACTER}" in text else repr(text)


def _mean(a: np.ndarray) -> float:
    """Over what there is."""
    return float(np.nanmean(a)) if np.isfinite(a).any() else float("nan")
