"""The catalogue of routers as a table: moejax routers [--markdown] [--causality]"""

from absl import flags

from moejax import cli
from moejax.causality import Dependence, dependence
from moejax.moe import MoeOptions
from moejax.routing import ROUTERS, RouterSpec, hyperparameters, make_router

MARKDOWN = flags.DEFINE_bool("markdown", False, "as a Markdown table, as the README shows it")
CAUSALITY = flags.DEFINE_bool("causality", False, "on which other tokens an output depends")

COLUMNS = (
    *("router", "who chooses", "weight", "balance", "causal", "droppable"),
    *("options", "paper", "checked against"),
)
_EXPERTS = 8
# Column: (capacity factor, groups, training).
SETTINGS: dict[str, tuple[float | None, str, bool]] = {
    "nothing dropped": (None, "batch", True),
    "capacity 1 a sequence": (1.0, "sequence", True),
    "capacity 1 a batch": (1.0, "batch", True),
    "evaluation, nothing dropped": (None, "batch", False),
}


def rows() -> list[tuple[str, ...]]:
    """One row a router, in the order of ROUTERS."""
    return [
        (
            name,
            spec.chooses,
            spec.weight,
            spec.balance,
            causal(spec),
            "yes" if droppable(spec) else "no",
            ", ".join(hyperparameters(name)),
            spec.paper,
            spec.checked,
        )
        for name, spec in ROUTERS.items()
    ]


def causal(spec: RouterSpec) -> str:
    """Whether a token's experts are its own affair, as long as nothing drops."""
    return {"token": "yes", "batch": "in evaluation", "expert": "no"}[spec.chooses]


def droppable(spec: RouterSpec) -> bool:
    """Whether a crowd at one expert loses assignments at a capacity factor of 1. Not where experts
    take their fair share themselves, nor where all experts are listed for all tokens."""
    return not (spec.every_expert or spec.chooses == "expert")


def causality_rows() -> list[tuple[str, ...]]:
    """One row a router: what was found in each setting, by perturbation (p) or gradient (g)."""
    return [(name, *(found(measured(name, setting)) for setting in SETTINGS)) for name in ROUTERS]


def measured(name: str, setting: str) -> Dependence:
    """The dependence of a router at its default options in one of the settings."""
    factor, groups, training = SETTINGS[setting]
    options = MoeOptions(make_router(name), capacity_factor=factor, groups=groups)
    return dependence(options, _EXPERTS, training=training)


def found(d: Dependence) -> str:
    """A cell of the table of causality."""
    whose = {"later": (d.later, d.later_gradient), "others": (d.others, d.others_gradient)}
    parts = [
        f"{name} ({', '.join(how for how, yes in zip('pg', ways, strict=True) if yes)})"
        for name, ways in whose.items()
        if any(ways)
    ]
    return ", ".join(parts) or "–"


def markdown(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    table = [columns, ("---",) * len(columns), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def main(arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}")
    columns: tuple[str, ...] = ("router", *SETTINGS) if CAUSALITY.value else COLUMNS
    lines = causality_rows() if CAUSALITY.value else rows()
    if MARKDOWN.value:
        print(markdown(columns, lines))
        return 0
    width = max(map(len, columns)) + 2
    for row in lines:
        print(row[0])
        for column, value in zip(columns[1:], row[1:], strict=True):
            print(f"  {column:<{width}}{value}")
    return 0


if __name__ == "__main__":
    cli.run(main)
