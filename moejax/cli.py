"""`moejax VERB ...`: the same mains as `python -m moejax.VERB`, and how all of them report bad input."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

VERBS = {
    "train": "train one config",
    "compare": "train the variants of an experiment over seeds, and report",
    "report": "tables, plots and verdicts of finished runs",
    "evaluate": "bits per byte of a run's checkpoint on held-out text",
    "routers": "the catalogue of routers",
    "bench": "the layer's speed beside a dense feed-forward network",
    "data": "prepare a corpus, and show what is in it",
}


def main() -> None:
    """Entry point of the console script."""
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        lines = [f"  moejax {verb:<10} {what}" for verb, what in VERBS.items()]
        asked = sys.argv[1:2]
        if asked and asked[0] not in ("-h", "--help", "help"):
            lines.insert(0, f"error: no verb {asked[0]!r}")
        print("\n".join([*lines, "moejax VERB --help lists a verb's flags"]), file=sys.stderr)
        sys.exit(0 if asked and asked[0] in ("-h", "--help", "help") else 2)
    verb = sys.argv.pop(1)
    sys.argv[0] = f"moejax {verb}"
    with_experiments(sys.argv)
    module = importlib.import_module(f"moejax.{verb}")
    run(module.main)


def with_experiments(argv: list[str]) -> None:
    """A positional experiment becomes --config, and its folder's parent importable."""
    for i, argument in enumerate(argv[1:], start=1):
        path = argument.removeprefix("--config=").partition(":")[0]
        if path.endswith(".py"):
            sys.path.insert(0, str(Path(path).absolute().parent.parent))
            if not argument.startswith("-"):
                argv[i] = f"--config={argument}"


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parse flags, call main, exit. Bad input is one line and exit code 2, before anything compiles.

    MOEJAX_TRACEBACK=1 shows where an error came from.
    """
    try:
        with_experiments(sys.argv)
        arguments = flags.FLAGS(sys.argv)
        sys.exit(main(arguments[1:]) or 0)
    except (flags.Error, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        if os.environ.get("MOEJAX_TRACEBACK"):
            raise
        message = " ".join(str(error.args[0] if error.args else error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
