"""The routing of what was written, as a trace that every reader of traces opens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moejax.generation.writing import Written, looks, writing_config
from moejax.tracing import Part, Trace, TraceWriter, concatenate
from moejax.training.saved import SavedRun
from moejax.training.traced import traces


def trace_written(run: SavedRun, prompts: Sequence[np.ndarray], written: Written) -> Trace:
    """The trace of each prompt and what follows it, a document each, with all scores and the
    model's best guesses. One pass over the finished texts, which routes as writing did.

    Raises:
      ValueError: no layer of the model routes; or the prompts were compared with each other, as
        they stood in the batch that wrote, and another pass is not the same.
    """
    if run.config.moe.experts and any(looks(run.config)):
        raise ValueError(
            f"router {run.config.router.label!r} compared the prompts with each other at each "
            "step: a pass over the finished texts does not route as they were written"
        )
    texts = [np.concatenate(pair) for pair in zip(prompts, written.token_ids, strict=True)]
    program = run.program
    batches = run.dataset.token_batches(texts, batch=program.batch, share=program.rows)
    config = writing_config(run.config, program.batch, program.batch)
    dropless = run._replace(config=config)
    return concatenate(list(traces(dropless, batches, scores=True, predicted=True)))


def save_trace(folder: Path, trace: Trace, prompts: Sequence[np.ndarray]) -> None:
    """Writes a trace of written texts; beside it stands how many tokens of each were given."""
    given = [len(prompt) for prompt in prompts]
    writer = TraceWriter(folder, trace.meta, extra={"prompt_tokens": given})
    writer.add(Part(1, trace, np.bincount(trace.document_T)))
    writer.flush()
