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
    runs = asked(arguments, STEP.value)
    text = read_text(TEXT.value, PROMPT.value)
    from moejax.viewing import page
    from moejax.viewing.gathering import gather, names

    named = zip(names([workdir for workdir, _ in runs]), runs, strict=True)
    panels = [gather(name, *run, text, TOKENS.value) for name, run in named]
    out = Path(OUT.value)
    title = "Where each token goes: " + " and ".join(panel.title for panel in panels)
    out.write_text(page(panels, title), encoding="utf-8")
    print(f"{out}: {len(panels[0].trace):,} tokens, {out.stat().st_size / 1e6:.1f} MB")
    return 0


def asked(arguments: list[str], steps: list[str]) -> list[tuple[Path, int | None]]:
    """(run, step) of one panel or two; a step of None is the newest.

    Raises:
      ValueError: not one run or two, not as many steps, or a step that is no number.
    """
    runs = [Path(argument) for argument in arguments]
    if not 1 <= len(runs) <= 2:
        raise ValueError("usage: moejax view RUN [RUN2]")
    wrong = [step for step in steps if not step.isdecimal()]
    if wrong:
        raise ValueError(f"--step={','.join(steps)}: {wrong[0]!r} is no step; give N or N,M")
    if len(runs) == 1 and len(steps) == 2:
        runs *= 2
    if steps and len(steps) != len(runs):
        raise ValueError(f"{len(steps)} steps for {len(runs)} runs; give as many")
    wanted = [int(step) for step in steps] if steps else [None] * len(runs)
    return list(zip(runs, wanted, strict=True))


def read_text(file: str | None, prompt: str | None) -> str | None:
    """The text that was asked for; None = the run's own. Raises ValueError where there are two, or
    an empty one."""
    if file is not None and prompt is not None:
        raise ValueError("give --text or --prompt, not both")
    if file is None and prompt is None:
        return None
    text = prompt if file is None else Path(file).read_text(encoding="utf-8")
    if not text:
        raise ValueError(f"{'--prompt' if file is None else file} is empty: there is no token")
    return text


if __name__ == "__main__":
    cli.run(main)
