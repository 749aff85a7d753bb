"""The catalogue of routers as a table: moejax routers [--markdown]"""

from absl import flags

from moejax import cli
from moejax.routing import ROUTERS, hyperparameters

MARKDOWN = flags.DEFINE_bool("markdown", False, "as a Markdown table, as the README shows it")

_COLUMNS = ("router", "who chooses", "weight", "balance", "options", "paper")


def rows() -> list[tuple[str, ...]]:
    """One row a router, in the order of ROUTERS."""
    return [
        (
            name,
            spec.chooses,
            spec.weight,
            spec.balance,
            ", ".join(hyperparameters(name)),
            spec.paper,
        )
        for name, spec in ROUTERS.items()
    ]


def markdown() -> str:
    """The table of the README."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def main(arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}")
    if MARKDOWN.value:
        print(markdown())
        return 0
    for row in rows():
        print(row[0])
        for column, value in zip(_COLUMNS[1:], row[1:], strict=True):
            print(f"  {column:<12}{value}")
    return 0


if __name__ == "__main__":
    cli.run(main)
