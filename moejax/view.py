"""A page that shows where each token goes: moejax view RUN [RUN2] [--text=FILE] [--out=view.html]

RUN is the working directory of a training run; two of them, or one with --step=N,M, stand side by
side. The page is one file and needs no network.
"""

from pathlib import Path

from absl import flags

from moejax import cli

TEXT = flags.DEFINE_string("text", None, "a file to read; default: the run's validation text")
PROMPT = flags.DEFINE_string("prompt", None, "the text itself")
STEP = flags.DEFINE_list("step", [], "which checkpoint, one a panel; default: the newest")
TOKENS = flags.DEFINE_integer("tokens", 2000, "at most so many", lower_bound=1)
OUT = flags.DEFINE_string("out", "view.html", "where the page goes")


def main(arguments: list[str]) -> int:
    from moejax.viewing import page
    from moejax.viewing.arguments import asked, read_text
    from moejax.viewing.gathering import gather, names

    runs = asked(arguments, STEP.value)
    text = read_text(TEXT.value, PROMPT.value)
    named = zip(names([workdir for workdir, _ in runs]), runs, strict=True)
    panels = [gather(name, *run, text, TOKENS.value) for name, run in named]
    out = Path(OUT.value)
    title = "Where each token goes: " + " and ".join(panel.title for panel in panels)
    out.write_text(page(panels, title), encoding="utf-8")
    print(f"{out}: {len(panels[0].trace):,} tokens, {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    cli.run(main)
