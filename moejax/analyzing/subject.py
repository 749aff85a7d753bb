"""Whose routing is analysed: a saved run on some text, or a trace in a folder."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.analysis.counting import Measured
from moejax.analysis.measures import Measures, measure
from moejax.analysis.saturation import Saturation
from moejax.data import Batch, open_dataset
from moejax.tracing import Trace, open_trace
from moejax.training.ablate import ablate
from moejax.training.saved import SavedRun, open_run, read_config, saved_steps
from moejax.training.traced import trace_meta, traces


@dataclasses.dataclass(frozen=True)
class Analysed:
    """What was found.

    Attributes:
      name: of the run or the trace.
      provenance: where the numbers come from.
      measures: of the trace.
      caveats: lines to read first.
      saturation: earlier step -> how much of the analysed step's choices stood then.
      ablation: see `ablate`; None = not made.
      decode: ids -> text; None = the tokeniser is not known.
    """

    name: str
    provenance: dict[str, str]
    measures: Measures
    caveats: tuple[str, ...] = ()
    saturation: dict[int, Measured] = dataclasses.field(default_factory=dict)
    ablation: dict[str, Any] | None = None
    decode: Callable[[Iterable[int]], str] | None = None


def analyse_trace(folder: Path) -> Analysed:
    """The analysis of a trace. One that is cut short is analysed as far as it goes, and says so.

    Raises:
      FileNotFoundError: there is no trace.
      ValueError: it has no tokens.
    """
    files = open_trace(folder)
    try:
        measures = measure(files)
    except ValueError as error:
        raise ValueError(files.cut or f"{folder}: {error}") from None
    provenance = {"trace": str(folder), "made by": files.meta.source}
    caveats = (files.cut,) if files.cut else ()
    return Analysed(folder.name, provenance | _size(measures), measures, caveats)


def analyse_run(
    workdir: Path,
    *,
    data: str = "",
    domains: tuple[str, ...] = (),
    rows: int = 0,
    step: int | None = None,
    ablation: bool = True,
) -> Analysed:
    """The analysis of a saved run, of what it does with held-out text.

    Args:
      workdir: of the run.
      data: a corpus's name, or a file of text; '' = the run's own corpus.
      domains: of the corpus; () = all.
      rows: how many rows of it; 0 = all.
      step: which checkpoint; None = the newest. Earlier ones are compared with it.
      ablation: evaluate without experts too.

    Raises:
      FileNotFoundError: no run, no such checkpoint, no such text.
      ValueError: nothing routes, or the text has no token.
    """
    config = read_config(workdir)
    if not config.moe_layers or config.moe.slots:
        raise ValueError(
            f"no layer of {workdir} routes tokens to experts (moe.experts={config.moe.experts}, "
            f"moe.slots={config.moe.slots}): there is nothing to analyse"
        )
    run = open_run(workdir, step)
    run, batches = _on_text(run, data, domains, rows)
    here = int(run.state.step)
    earlier = {
        s: open_run(workdir, s)._replace(dataset=run.dataset)
        for s in saved_steps(workdir)
        if s < here
    }
    meta = trace_meta(run.config, run.dataset)
    saturation = {s: Saturation(meta) for s in earlier}
    measures = measure(_beside(run, earlier, saturation, batches))
    provenance = {
        "run": str(workdir),
        "step": str(here),
        "router": f"{config.router.label}, {config.moe.experts} experts",
        "text": data or config.data.name,
        "held-out rows": f"{len(batches) * run.program.batch} of {config.data.sequence} tokens",
        "tokeniser": run.dataset.tokenizer.identity,
    }
    return Analysed(
        name=f"{workdir.name}, step {here}",
        provenance=provenance | _size(measures),
        measures=measures,
        saturation={s: found.saturation() for s, found in saturation.items()},
        ablation=ablate(run, batches) if ablation else None,
        decode=run.dataset.decode,
    )


def _on_text(
    run: SavedRun, data: str, domains: tuple[str, ...], rows: int
) -> tuple[SavedRun, Sequence[Batch]]:
    """The run with the text that is asked for, cut by its own tokeniser, and the text's rows."""
    if data.endswith(".txt"):
        if domains:
            raise ValueError(f"--domains={','.join(domains)}: {data} has no domains")
        try:
            text = Path(data).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{data} is not UTF-8: {error}") from None
        batches = run.dataset.text_batches(text, batch=run.program.batch, share=run.program.rows)
        return run, batches[: -(-rows // run.program.batch) or None]
    if data or domains:
        own = run.config.data
        config = dataclasses.replace(own, name=data or own.name, domains=domains)
        run = run._replace(dataset=open_dataset(config, tokenizer=run.dataset.tokenizer))
    program = run.program
    return run, run.dataset.validation_batches(
        batch=program.batch, limit_rows=rows, share=program.rows
    )


def _beside(
    run: SavedRun,
    earlier: Mapping[int, SavedRun],
    saturation: Mapping[int, Saturation],
    batches: Sequence[Batch],
) -> Iterator[Trace]:
    """The run's trace, each part of it compared with what earlier checkpoints make of its rows."""
    others = [traces(run, batches) for run in earlier.values()]
    for part, *before in zip(traces(run, batches, predicted=True), *others, strict=True):
        for found, other in zip(saturation.values(), before, strict=True):
            found.add(other, part)
        yield part


def _size(measures: Measures) -> dict[str, str]:
    tokens, documents = measures.load.tokens, measures.documents
    return {"tokens": f"{tokens:,} in {documents:,} documents, or parts of one in a row"}
