"""Held-out text: bits per byte by domain, and the routing over the whole evaluation set."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from moejax.analysis.domains import by_domain, recovered, shuffled, specialisation
from moejax.config import Config
from moejax.data import Batch, TextDataset
from moejax.routing import Decisions
from moejax.routing.floors import max_vio_floor
from moejax.routing.metrics import figures
from moejax.tracing import trace_of_rows
from moejax.training.program import Program
from moejax.training.recording import trace_meta
from moejax.training.state import TrainState
from moejax.training.step import TRACED_TOKENS, EvalSums, RowLoads


def evaluate(
    config: Config, program: Program, state: TrainState, dataset: TextDataset
) -> dict[str, Any]:
    """One evaluation record.

    Returns:
      bpb: bits per byte of text, over all domains, and where tokens are masked per byte of those;
      bpb_domain; tokens, and how many of them were targets; and for a model with experts
      max_vio_global (loads summed over the whole set), its floor under random routing, drop,
      left_behind, dead, load_LE; and by domain: load_domain [L, E], assignments, with the
      `specialisation` of experts, its floor, and the share of assignments that `recovered` the
      domains. traced: the `Trace` of the first TRACED_TOKENS tokens. bpb_as_trained where training
      lets tokens compete in other groups.
    """
    batches = evaluation_batches(config, program, dataset)
    sums = total(program.eval_step, state, batches, dataset.bytes_V)
    record: dict[str, Any] = {
        "bpb": bits_per_byte(sums.nll_domain.sum(), sums.bytes_domain.sum()),
        "bpb_domain": {
            name: bits_per_byte(nll, size)
            for name, nll, size in zip(
                dataset.domains, sums.nll_domain, sums.bytes_domain, strict=True
            )
            if size
        },
        "tokens": int(sums.tokens),
        "targets": int(sums.targets),
    }
    if sums.stats is not None:
        routing = figures(sums.stats)
        record |= {key: routing[key] for key in ("drop", "left_behind", "dead", "load_LE")}
        record["max_vio_global"] = routing["max_vio"]
        experts = config.moe.experts
        # Soft MoE may have fewer slots than tokens, or more.
        choices = min(experts, max(1, round(config.choices)))
        record["max_vio_floor"] = max_vio_floor(record["tokens"], experts, choices)
    if sums.rows is not None:
        record |= _by_domain(sums.rows, dataset.domains)
    if sums.traced is not None:
        record["traced"] = trace_of_rows(trace_meta(config, dataset), *sums.traced)
    if program.eval_as_trained is not None:
        pooled = total(program.eval_as_trained, state, batches, dataset.bytes_V)
        record["bpb_as_trained"] = bits_per_byte(pooled.nll_domain.sum(), pooled.bytes_domain.sum())
    return record


def evaluation_batches(config: Config, program: Program, dataset: TextDataset) -> list[Batch]:
    """The rows of an evaluation, on the devices."""
    batches = dataset.validation_batches(
        batch=program.batch, limit_rows=config.train.eval_rows, share=program.rows
    )
    return [program.put(batch) for batch in batches]


def _by_domain(rows: RowLoads, domains: tuple[str, ...]) -> dict[str, Any]:
    load_GLE = by_domain(rows.load_BLE, rows.domain_B, len(domains))
    return {
        "load_domain": dict(zip(domains, load_GLE, strict=True)),
        "specialisation": specialisation(load_GLE).mean(),
        "specialisation_floor": shuffled(rows.load_BLE, rows.domain_B, len(domains)).mean(),
        "recovered": recovered(load_GLE).max(),
    }


def total(
    step: Callable[..., EvalSums],
    state: TrainState,
    batches: Iterable[Any],
    bytes_V: np.ndarray,
) -> EvalSums:
    """The sums over all batches, on the host, in double precision and 64-bit integers; what is of
    rows, row after row, and traced the first ones."""
    table, rows = np.asarray(bytes_V, np.float32), []
    traced: list[tuple[Batch, Decisions]] = []
    added: Any = None
    for batch in batches:
        found = step(state.params, state.router_state, batch, table)
        if found.traced is not None and _tokens(traced) < TRACED_TOKENS:
            traced.append(jax.device_get(found.traced))
        sums = jax.device_get(found._replace(traced=None))
        rows.append(sums.rows)
        sums = sums._replace(rows=None)
        wide = jax.tree.map(lambda a: np.asarray(a, np.result_type(a.dtype, np.int64)), sums)
        added = wide if added is None else jax.tree.map(np.add, added, wide)
    return added._replace(
        rows=jax.tree.map(lambda *a: np.concatenate(a), *rows), traced=_joined(traced)
    )


def _tokens(traced: list[tuple[Batch, Decisions]]) -> int:
    return sum(batch.tokens_BS.size for batch, _ in traced)


def _joined(traced: list[tuple[Batch, Decisions]]) -> tuple[Batch, Decisions] | None:
    if not traced:
        return None
    batches, decisions = zip(*traced, strict=True)
    return (
        jax.tree.map(lambda *a: np.concatenate(a), *batches),
        jax.tree.map(lambda *a: np.concatenate(a, 1), *decisions),
    )


def bits_per_byte(nats: Any, size: Any) -> float:
    """Nats of text that is `size` bytes."""
    return float(nats) / (math.log(2) * float(size))
