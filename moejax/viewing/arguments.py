"""What the command line asks for: which checkpoints of which runs, over what text."""

from pathlib import Path


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
