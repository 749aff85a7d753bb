"""Write on with a trained model: moejax generate WORKDIR --prompt='The state of' [--tokens=N]

Greedy, unless --temperature is above 0. Texts go to standard output, speed to standard error.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from moejax import cli

if TYPE_CHECKING:
    import numpy as np

    from moejax.generation.writing import Written
    from moejax.training.saved import SavedRun

PROMPT = flags.DEFINE_multi_string("prompt", [], "how the text begins; repeat it for several texts")
PROMPTS = flags.DEFINE_string("prompts", None, "a file of prompts, one a line")
TOKENS = flags.DEFINE_integer("tokens", None, "how many to write; default: what the context holds")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 = always the likeliest token")
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens of this total probability")
SEED = flags.DEFINE_integer("seed", 0, "of the draws of the first text; the next has seed + 1")
TRACE = flags.DEFINE_string("trace", None, "a folder for the trace of which expert took what")
VIEW = flags.DEFINE_string("view", None, "an HTML page that shows it, as `moejax view` makes them")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the newest")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise ValueError("usage: moejax generate WORKDIR --prompt=TEXT")
    texts = _texts()
    from moejax.generation.sampling import checked
    from moejax.generation.writing import write
    from moejax.training.saved import open_run

    checked(TEMPERATURE.value, TOP_P.value)
    workdir = Path(arguments[0])
    run = open_run(workdir, STEP.value)
    prompts = run.dataset.tokenizer.encode(texts)
    written = write(
        run,
        prompts,
        tokens=_tokens(prompts, run.config.data.sequence),
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        seed=SEED.value,
    )
    _show(run, prompts, written)
    if TRACE.value or VIEW.value:
        _keep(workdir, run, prompts, written)
    return 0


def _keep(
    workdir: Path, run: "SavedRun", prompts: "Sequence[np.ndarray]", written: "Written"
) -> None:
    """The routing of what was written, as a trace and as a page."""
    from moejax.generation.traced import save_trace, trace_written
    from moejax.viewing import page
    from moejax.viewing.gathering import names, panel_of

    trace = trace_written(run, prompts, written)
    if TRACE.value:
        save_trace(Path(TRACE.value), trace, prompts)
    if VIEW.value:
        (name,) = names([workdir])
        panel = panel_of(name, workdir, run, trace)
        html = page([panel], f"What {panel.title} wrote, and where each token went")
        Path(VIEW.value).write_text(html, encoding="utf-8")


def _texts() -> list[bytes]:
    """The prompts as bytes. Raises ValueError where there is none, or an empty one."""
    texts = [os.fsencode(text) for text in PROMPT.value]
    if PROMPTS.value is not None:
        texts += Path(PROMPTS.value).read_bytes().splitlines()
    if not texts:
        raise ValueError("nothing to go on from: give --prompt=TEXT or --prompts=FILE")
    for number, text in enumerate(texts, start=1):
        if not text:
            raise ValueError(
                f"prompt {number} of {len(texts)} is empty; give at least one character"
            )
        if b"\0" in text:
            raise ValueError(
                f"prompt {number} of {len(texts)} holds a NUL character at byte {text.index(0)}, "
                "which separates documents; leave it out"
            )
    return texts


def _tokens(prompts: "Sequence[np.ndarray]", context: int) -> int:
    """How many to write. Raises ValueError where the model has never seen so many."""
    longest = max(map(len, prompts))
    tokens = max(1, context - longest) if TOKENS.value is None else TOKENS.value
    if tokens < 1:
        raise ValueError(f"--tokens={tokens} must be at least 1")
    if longest + tokens > context:
        raise ValueError(
            f"the longest prompt's {longest} tokens and {tokens} new ones are more than the "
            f"{context} positions that the model was trained on (data.sequence); lower --tokens or "
            "shorten the prompt"
        )
    return tokens


def _show(run: "SavedRun", prompts: "Sequence[np.ndarray]", written: "Written") -> None:
    for number, (prompt, ids) in enumerate(zip(prompts, written.token_ids, strict=True), start=1):
        if len(prompts) > 1:
            print(f"--- {number}")
        print(run.dataset.tokenizer.decode([*prompt, *ids]))
    total = sum(map(len, written.token_ids))
    print(
        f"step {int(run.state.step)}: {total} tokens in {written.seconds:.2f} s, "
        f"{total / written.seconds:,.0f} tokens/s; compiled in {written.compile_seconds:.1f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    cli.run(main)
