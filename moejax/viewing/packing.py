"""Panels as JSON: arrays in base64, scores in 8 bits, weights in float16. template/decode.js reads.

The scores of chosen experts are in float16 too, so that they agree with the weights to the digits
shown.

An array is {"dtype": u1 | u2 | f2, "shape", "data"}: little-endian, the last axis fastest.
"""

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.viewing.panel import History, Panel

LEVELS = 255
DEPTH = 12.0  # nats below a token's best expert that are still told apart
MOMENTS = 240  # of the training; the slider has no more
SMALLEST = 6e-8  # of float16: a score of 0 may be as large


def pack(panels: Sequence[Panel]) -> dict[str, Any]:
    """The page's data.

    Raises:
      ValueError: panels that are not of one text, or without scores, or not of as many layers.
    """
    first = panels[0]
    for panel in panels:
        _check(first, panel)
    trace = first.trace
    return {
        "paired": len({panel.run for panel in panels}) < len(panels),
        "text": {
            "piece": first.piece_T,
            "target": first.target_T,
            "document": array(_ranks(trace.document_T)),
            "domain": array((trace.domain_T + 1).astype(np.uint16)),  # 0 = unknown
            "domains": list(trace.meta.domains),
        },
        "panels": [_panel(panel) for panel in panels],
    }


def _check(first: Panel, panel: Panel) -> None:
    meta, other = panel.trace.meta, first.trace.meta
    if panel.trace.scores_TLE is None:
        raise ValueError(f"the trace of {panel.title} has no scores; trace it with scores=True")
    if len(meta.layers) != len(other.layers):
        raise ValueError(
            f"{panel.title} has {len(meta.layers)} layers with experts, {first.title} "
            f"{len(other.layers)}: side by side they need as many"
        )
    if not np.array_equal(panel.trace.token_T, first.trace.token_T):
        raise ValueError(
            f"{panel.title} reads {len(panel.trace):,} tokens, {first.title} {len(first.trace):,}, "
            "or other ones: side by side needs one tokeniser, sequence length and text"
        )


def _panel(panel: Panel) -> dict[str, Any]:
    trace = panel.trace
    assert trace.scores_TLE is not None
    used = np.flatnonzero((trace.expert_TLR < trace.meta.experts).any((0, 1)))
    width = int(max(used, default=0)) + 1  # R of routers that may choose all of E is E
    expert_TLR = trace.expert_TLR[..., :width]
    some_TLR = np.minimum(expert_TLR, trace.meta.experts - 1)
    chosen_TLR = np.take_along_axis(trace.scores_TLE, some_TLR, axis=-1)
    return {
        "title": panel.title,
        "run": panel.run,
        "experts": trace.meta.experts,
        "layers": list(trace.meta.layers),
        "facts": panel.facts,
        "sizes": dataclasses.asdict(panel.sizes),
        "guess": panel.guess_T,
        "expert": array(expert_TLR),
        "weight": array(trace.weight_TLR[..., :width].astype(np.float16)),
        "dropped": array(np.packbits(trace.dropped_TLR[..., :width])),
        "entropy": array(trace.entropy_TL.astype(np.float16)),
        "margin": array(trace.margin_TL.astype(np.float16)),
        "chosen": array(chosen_TLR.astype(np.float16)),
        "scores": quantised(trace.scores_TLE),
        "history": None if panel.history is None else _history(panel.history),
    }


def array(a: np.ndarray) -> dict[str, Any]:
    """An array of uint8, uint16 or float16 for JSON."""
    kind = {"uint8": "u1", "uint16": "u2", "float16": "f2"}[a.dtype.name]
    data = base64.b64encode(np.ascontiguousarray(a, f"<{kind}").tobytes()).decode()
    return {"dtype": kind, "shape": list(a.shape), "data": data}


def quantised(scores_TLE: np.ndarray) -> dict[str, Any]:
    """Scores in 8 bits each, between the least and the greatest of a token at a layer.

    What is cut into levels are the router's logits, where the scores give them away: those of a
    softmax up to a constant, those of a sigmoid. So small probabilities keep their digits.

    Returns:
      gate: 'softmax', 'sigmoid', or '' = the scores themselves; low, high: float16 [T, L]; level.
    """
    gate = gate_of(scores_TLE)
    value_TLE = scores_TLE.astype(np.float32)
    if gate == "softmax":
        value_TLE = np.log(np.maximum(value_TLE, SMALLEST))
    if gate == "sigmoid":
        value_TLE = np.clip(value_TLE, SMALLEST, 1 - 2**-12)
        value_TLE = np.log(value_TLE / (1 - value_TLE))
    least_TL, most_TL = value_TLE.min(-1), value_TLE.max(-1)
    if gate:
        least_TL = np.maximum(least_TL, most_TL - DEPTH)
    low_TL, high_TL = least_TL.astype(np.float16), most_TL.astype(np.float16)
    low_TL1 = low_TL.astype(np.float32)[..., None]
    range_TL1 = high_TL.astype(np.float32)[..., None] - low_TL1
    level_TLE = (value_TLE - low_TL1) / np.where(range_TL1 > 0, range_TL1, 1) * LEVELS
    level_TLE = np.clip(np.round(level_TLE), 0, LEVELS).astype(np.uint8)
    return {"gate": gate, "low": array(low_TL), "high": array(high_TL), "level": array(level_TLE)}


def gate_of(scores_TLE: np.ndarray) -> str:
    """What made the scores of logits: 'softmax' where they sum to 1, 'sigmoid' where all lie
    between 0 and 1, '' = nobody knows."""
    sum_TL = scores_TLE.sum(-1, dtype=np.float32)
    if scores_TLE.min() >= 0 and np.allclose(sum_TL, 1, atol=2e-2):
        return "softmax"
    return "sigmoid" if scores_TLE.min() > 0 and scores_TLE.max() <= 1 else ""


def _history(history: History) -> dict[str, Any]:
    count = len(history.step_H)
    kept = np.unique(np.linspace(0, count - 1, min(count, MOMENTS)).round().astype(int))
    load_HLE = history.load_HLE[kept].astype(np.float16)
    return {"step": history.step_H[kept].tolist(), "load": array(load_HLE)}


def _ranks(document_T: np.ndarray) -> np.ndarray:
    """Documents numbered from 0 without gaps."""
    return np.unique(document_T, return_inverse=True)[1].astype(np.uint16)
