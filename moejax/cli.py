"""`moejax VERB ...`: the same mains as `python -m moejax.VERB`, and how all of them report bad
input."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

from moejax.names import did_you_mean

VERBS = {
    "train": "train one config",
    "compare": "train the variants of an experiment over seeds, and report",
    "report": "tables, plots and verdicts of finished runs",
    "evaluate": "bits per byte of a run's checkpoint on held-out text",
    "routers": "the catalogue of routers",
    "plan": "memory, FLOPs, collectives and speed on chips that are not here",
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
    module = importlib.import_module(f"moejax.{verb}")
    run(module.main)


def with_experiments(argv: list[str]) -> None:
    """A positional experiment becomes --config=, and its folder's parent importable. Edits argv.

    Raises:
      FileNotFoundError: no such experiment file, with the nearest of its folder.
    """
    for i, argument in enumerate(argv[:-1]):
        if argument in ("--config", "-config"):
            argv[i : i + 2] = [f"--config={argv[i + 1]}"]
    for i, argument in enumerate(argv[1:], start=1):
        path = Path(argument.removeprefix("--config=").partition(":")[0])
        if path.suffix != ".py":
            continue
        if not path.is_file():
            there = (str(file) for file in sorted(path.parent.glob("*.py")))
            raise FileNotFoundError(f"no experiment file {path}{did_you_mean(str(path), there)}")
        sys.path.insert(0, str(path.absolute().parent.parent))
        if not argument.startswith("-"):
            argv[i] = f"--config={argument}"


def parse(argv: list[str]) -> list[str]:
    """Parse the flags; returns the positional arguments.

    Raises:
      ValueError: an unknown flag or config key, a value of another type, an experiment that fails.
    """
    with_experiments(argv)
    try:
        return flags.FLAGS(argv)[1:]
    except (AttributeError, KeyError) as error:  # ml_collections, of an unknown key
        raise ValueError(_unknown_key(str(error.args[0]), argv)) from error
    except (flags.Error, TypeError) as error:
        raise ValueError(_reason(str(error))) from error


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parse flags, call main, exit. Bad input is one line and exit code 2, before anything
    compiles.

    MOEJAX_TRACEBACK=1 shows where an error came from.
    """
    try:
        sys.exit(main(parse(sys.argv)) or 0)
    except (ValueError, OSError) as error:
        if os.environ.get("MOEJAX_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _unknown_key(text: str, argv: list[str]) -> str:
    """ml_collections' text as a sentence, with the whole key as it was given."""
    found = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
    wrong = found[2] if found else text.strip("\\'\"")
    given = [match[1] for a in argv if (match := re.match(r"--?config\.([\w.]+)", a))]
    key = next((key for key in given if wrong in key.split(".")), wrong)
    parts = [found[1] if found and part == wrong else part for part in key.split(".")]
    return f"unknown config key {key}" + (f"; did you mean {'.'.join(parts)}?" if found else "")


def _reason(text: str) -> str:
    """The last line of a traceback that absl wrapped into its message, without the exception's
    name."""
    if "Traceback (most recent call last)" not in text:
        return text
    return re.sub(r"^[\w.]+(Error|Exception): ", "", text.strip().splitlines()[-1])
