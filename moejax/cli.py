"""`moejax VERB ...`: the same mains as `python -m moejax.VERB`, and how all of them report bad
input."""

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import config_flags

from moejax import pages
from moejax.names import did_you_mean

VERBS = {
    "train": "train one config",
    "compare": "train the variants of an experiment over seeds, and report",
    "report": "tables, plots and verdicts of finished runs",
    "evaluate": "bits per byte of a run's checkpoint on held-out text",
    "generate": "write on from a prompt",
    "analyze": "what the routers of a run learned, beside chance",
    "view": "a page that shows where each token of a text goes",
    "routers": "the catalogue of routers",
    "plan": "memory, FLOPs, collectives and speed on chips that are not here",
    "bench": "the layer's speed beside a dense feed-forward network",
    "data": "prepare a corpus, and show what is in it",
}


def start() -> None:
    """Entry point of the console script."""
    pages.start_again()
    main()


def main() -> None:
    """The verb of the command line, in this process."""
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        lines = [f"  moejax {verb:<10} {what}" for verb, what in VERBS.items()]
        asked = sys.argv[1:2]
        if asked and asked[0] not in ("-h", "--help", "help"):
            lines.insert(0, f"error: no verb {asked[0]!r}")
        print("\n".join([*lines, "moejax VERB --help lists a verb's flags"]), file=sys.stderr)
        sys.exit(0 if asked and asked[0] in ("-h", "--help", "help") else 2)
    verb = sys.argv.pop(1)
    sys.argv[0] = f"moejax {verb}"
    run(importlib.import_module(module_of(verb)).main)


def module_of(verb: str) -> str:
    """The module whose main is a verb's; of a package, what `python -m` runs."""
    spec = importlib.util.find_spec(f"moejax.{verb}")
    package = spec is not None and spec.submodule_search_locations is not None
    return f"moejax.{verb}" + (".__main__" if package else "")


def experiment_of(argv: list[str]) -> str:
    """Takes PATH:SCALE, bare or as --config=, out of the arguments; "" = there is none."""
    for i, argument in enumerate(argv[1:], start=1):
        if argument in ("--config", "-config") and argv[i + 1 :]:
            return (argv.pop(i), argv.pop(i))[1]
        path = re.sub("^--?config=", "", argument)
        if path != argument or (path.partition(":")[0].endswith(".py") and path[0] != "-"):
            return (argv.pop(i), path)[1]
    return ""


def load_experiment(path: str) -> ModuleType:
    """Import an experiment file by its path; its folder's parent becomes importable.

    Raises:
      FileNotFoundError: no such file, with the nearest of its folder.
    """
    if not Path(path).is_file():
        there = (str(file) for file in sorted(Path(path).parent.glob("*.py")))
        raise FileNotFoundError(f"no experiment file {path}{did_you_mean(path, there)}")
    sys.path.insert(0, str(Path(path).absolute().parent.parent))
    spec = importlib.util.spec_from_file_location(f"experiment_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def define_config(experiment: str, argv: list[str]) -> None:
    """The experiment's config as the flag --config, whose keys are flags of their own.

    A router that is named on the command line brings its options before those are looked at.
    """
    from moejax.config import override

    path, _, scale = experiment.partition(":")
    module = load_experiment(path)
    config = module.get_config(*([scale] if scale else []))
    for argument in argv:
        name = re.sub("^--?config.router.name=", "", argument)
        if name != argument:
            config = override(config, {"router.name": name})
    config_flags.DEFINE_config_dict("config", config, "--config.KEY=VALUE overrides", sys_argv=argv)


def parse(argv: list[str]) -> list[str]:
    """Parse the flags; returns the positional arguments.

    Raises:
      ValueError: an unknown flag or config key, a value of another type, an experiment that fails.
    """
    experiment = experiment_of(argv)
    try:
        if experiment:
            define_config(experiment, argv)
            flags.DEFINE_string("experiment", experiment, "where the config came from")
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
    if {"--help", "-h"} & set(sys.argv):
        print(sys.modules[main.__module__].__doc__, _flags_of(main.__module__), sep="\n")
        sys.exit(0)
    try:
        sys.exit(main(parse(sys.argv)) or 0)
    except (ValueError, OSError) as error:
        if os.environ.get("MOEJAX_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _flags_of(module: str) -> str:
    known = flags.FLAGS
    return known.main_module_help() if module == "__main__" else known.module_help(module)


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
