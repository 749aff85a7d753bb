"""Traces of a saved run: its model over text, as evaluation routes it, written down by token."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import Config
from moejax.data import Batch
from moejax.model.transformer import logits
from moejax.routing import Decisions
from moejax.tracing import Part, Trace, TraceWriter, concatenate, trace_of_rows
from moejax.training.recording import trace_meta
from moejax.training.saved import SavedRun
from moejax.training.state import make_graph


def traces(
    run: SavedRun, batches: Iterable[Batch], *, scores: bool = False, predicted: bool = False
) -> Iterator[Trace]:
    """A trace of each batch, one at a time. Documents are numbered through.

    Args:
      run: a saved run.
      batches: rows of text, `run.program.batch` in each batch, of which a process brings its
        `run.program.rows`: `run.dataset.validation_batches` or `text_batches`.
      scores: keep the scores of all experts.
      predicted: keep the model's best guesses.

    Raises:
      ValueError: no layer of the model routes.
    """
    meta = trace_meta(run.config, run.dataset)
    program, state, documents = run.program, run.state, 0
    step = _tracing_step(run.config, run.dataset.vocab_size, program.mesh, scores, predicted)
    for batch in batches:
        with jax.set_mesh(program.mesh):
            traced = step(state.params, state.router_state, program.put(batch))
        trace = trace_of_rows(meta, *jax.device_get(traced))
        if not len(trace):
            continue
        document_T = trace.document_T + documents
        documents = int(document_T[-1]) + 1
        yield dataclasses.replace(trace, document_T=document_T)


def write_trace(run: SavedRun, batches: Iterable[Batch], folder: Path) -> int:
    """The trace of these batches, with the model's guesses, into a folder; read it with
    `moejax.tracing.open_trace`. What trace was there is replaced. Returns its tokens.

    Raises:
      ValueError: no layer of the model routes.
    """
    writer, tokens = TraceWriter(folder, trace_meta(run.config, run.dataset)), 0
    for number, trace in enumerate(traces(run, batches, predicted=True), start=1):
        writer.add(Part(number, trace, np.array([len(trace)])))
        tokens += len(trace)
    writer.flush()
    return tokens


def validation_batches(run: SavedRun, rows: int = 0) -> Sequence[Batch]:
    """The run's validation text as `traces` takes it; `rows` of it at most, 0 = all."""
    program = run.program
    return run.dataset.validation_batches(batch=program.batch, limit_rows=rows, share=program.rows)


def trace_text(run: SavedRun, text: str, *, scores: bool = True) -> Trace:
    """The trace of a text of any length, with the model's guesses. It is cut into rows of the run's
    sequence length, and each begins anew: nothing before it is seen.

    Where tokens of a whole batch compete, those of the text compete with nobody else.

    Raises:
      ValueError: no layer of the model routes, or the text holds no token.
    """
    program = run.program
    batches = run.dataset.text_batches(text, batch=program.batch, share=program.rows)
    return concatenate(list(traces(run, batches, scores=scores, predicted=True)))


@functools.lru_cache(maxsize=8)
def _tracing_step(
    config: Config, vocab_size: int, mesh: Mesh, scores: bool, predicted: bool
) -> Callable[..., tuple[Batch, Decisions, jax.Array | None]]:
    """A global batch to what its trace is made of, on every process."""
    evaluation = dataclasses.replace(config, moe=config.moe.evaluation())
    graph = make_graph(evaluation, vocab_size)

    def step(params: Any, router_state: Any, batch: Batch) -> Any:
        guess_BS, stats = nnx.merge(graph, params)(
            batch.tokens_BS,
            segment_BS=batch.segment_BS,
            position_BS=batch.position_BS,
            valid_BS=batch.valid_BS,
            router_state=router_state,
            record=True,
            head=_best_guess,
        )
        decisions = stats.decisions if scores else stats.decisions._replace(scores_TE=None)
        return batch, decisions, guess_BS if predicted else None

    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def _best_guess(x_BSD: jax.Array, w_DV: jax.Array) -> jax.Array:
    return logits(x_BSD, w_DV).argmax(-1).astype(jnp.int32)
