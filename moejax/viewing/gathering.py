"""From the folder of a run to a panel: the checkpoint is opened and traced over the text."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from moejax.config import Config
from moejax.model.size import model_size
from moejax.routing import hyperparameters
from moejax.tracing import Trace, concatenate
from moejax.training.records import read_records
from moejax.training.saved import SavedRun, open_run
from moejax.training.traced import trace_text, traces
from moejax.viewing.panel import History, Panel, Sizes
from moejax.viewing.pieces import pieces


def gather(name: str, workdir: Path, step: int | None, text: str | None, tokens: int) -> Panel:
    """A panel of a run at a checkpoint.

    Args:
      name: what the page calls the run.
      workdir: of the run.
      step: of the checkpoint; None = the newest.
      text: what to read; None = the first validation rows of the run's corpus, its domains in turn.
      tokens: at most.

    Raises:
      FileNotFoundError: no run, or no such checkpoint.
      ValueError: no layer of the model routes, or the text holds no token.
    """
    run = open_run(workdir, step)
    return panel_of(name, workdir, run, _trace(run, text, tokens)[:tokens])


def panel_of(name: str, workdir: Path, run: SavedRun, trace: Trace) -> Panel:
    """A panel of a run whose trace, with scores and guesses, is there already."""
    decode = run.dataset.decode
    assert trace.predicted_T is not None
    return Panel(
        run=name,
        step=int(run.state.step),
        trace=trace,
        piece_T=pieces(decode, trace.token_T, trace.document_T),
        target_T=_alone(decode, trace.target_T),
        guess_T=_alone(decode, trace.predicted_T),
        facts=facts(run.config),
        sizes=sizes(run.config, run.dataset.vocab_size),
        history=history(workdir),
    )


def names(workdirs: Sequence[Path]) -> list[str]:
    """A name of each run: the end of its path, by as many parts as tell them apart."""
    paths = [workdir.resolve() for workdir in workdirs]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        ends = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(ends)) == len(set(paths)):
            break
    return ends


def _trace(run: SavedRun, text: str | None, tokens: int) -> Trace:
    if text is not None:
        return trace_text(run, text)
    rows = -(-tokens // run.config.data.sequence)
    batches = run.dataset.validation_batches(
        batch=run.program.batch, limit_rows=rows, share=run.program.rows
    )
    return concatenate(list(traces(run, batches, scores=True, predicted=True)))


def _alone(decode: Callable[[Iterable[int]], str], token_T: np.ndarray) -> list[str]:
    return [decode([token]) for token in token_T.tolist()]


def history(workdir: Path) -> History | None:
    """The loads that a run recorded while it trained; None = it recorded none."""
    records = [
        record
        for record in read_records(workdir / "metrics.jsonl")
        if record["kind"] == "train" and "load_LE" in record
    ]
    if not records:
        return None
    share_HLE = np.array([record["load_LE"] for record in records], np.float32)
    step_H = np.array([record["step"] for record in records], np.int32)
    return History(step_H, share_HLE * share_HLE.shape[-1])


def sizes(config: Config, vocab_size: int) -> Sizes:
    size, moe = model_size(config, vocab_size), config.moe
    return Sizes(
        dim=config.model.dim,
        ffn=moe.ffn or config.model.ffn,
        total=size.total,
        active=size.active,
        choices=config.choices,
        shared=moe.shared,
    )


def facts(config: Config) -> dict[str, str]:
    """How the model routes, in words."""
    moe = config.moe.evaluation()
    usual = hyperparameters(config.router.name)
    options = ", ".join(
        f"{name} {value}"
        for name, value in config.router.options
        if name != "k" and value != usual[name]
    )
    losses = [f"{name} {weight:g}" for name, weight in config.balance if weight]
    capacity = "no limit"
    if moe.capacity_factor is not None:
        capacity = f"{moe.capacity_factor:g} x an even share, by {moe.groups}"
    return {
        "router": config.router.label + (f" ({options})" if options else ""),
        "balance losses": ", ".join(losses) or "none",
        "capacity": capacity,
    }
