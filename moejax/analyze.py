"""What a run's routers learned, beside chance: moejax analyze RUN_OR_TRACE [--data=stdlib]
[--domains=code,prose] [--rows=512] [--step=N] [--out=DIR]"""

from pathlib import Path

from absl import flags

from moejax import cli

DATA = flags.DEFINE_string("data", "", "a corpus or FILE.txt; default: the run's own held-out text")
DOMAINS = flags.DEFINE_list("domains", [], "of the corpus; default: all")
ROWS = flags.DEFINE_integer(
    "rows", 512, "how many rows of the run's length; 0 = all", lower_bound=0
)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the newest")
ABLATION = flags.DEFINE_bool("ablation", True, "evaluate without experts too; takes the most time")
OUT = flags.DEFINE_string("out", None, "where files go; default: RUN_OR_TRACE/analysis")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise ValueError("usage: moejax analyze RUN_OR_TRACE")
    path = Path(arguments[0])
    from moejax.analyzing.subject import analyse_run, analyse_trace
    from moejax.analyzing.write import write_analysis

    if (path / "config.json").is_file():
        found = analyse_run(
            path,
            data=DATA.value,
            domains=tuple(DOMAINS.value),
            rows=ROWS.value,
            step=STEP.value,
            ablation=ABLATION.value,
        )
    elif (path / "meta.json").is_file():
        found = analyse_trace(path)
    else:
        raise FileNotFoundError(f"{path} holds neither a run (config.json) nor a trace (meta.json)")
    out = Path(OUT.value or path / "analysis")
    print(write_analysis(found, out))
    print(f"page: {out / 'analysis.html'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
