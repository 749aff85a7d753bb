"""Tables, plots and verdicts of finished runs: moejax report runs/routers/smoke [DIR ...]
[--to=DIR]"""

from pathlib import Path

from absl import flags

from moejax import cli
from moejax.compare import load_suite
from moejax.reporting import load, write_report

SUITE = flags.DEFINE_string("suite", None, "experiment file:scale with the claims; default: as run")
TO = flags.DEFINE_string("to", None, "where the report goes; default: the first folder")


def main(arguments: list[str]) -> int:
    if not arguments:
        raise ValueError("usage: moejax report DIR [DIR ...]: the folders that compare wrote")
    results = load(*arguments)
    experiment = SUITE.value or results.suite.get("experiment", "")
    path, _, scale = experiment.partition(":")
    out = Path(TO.value or arguments[0])
    print(write_report(results, load_suite(path, scale), out))
    print(f"report: {out / 'report.html'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
