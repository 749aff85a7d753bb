"""Traces made by hand, and random ones: what the tests of measures share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.tracing import Trace, TraceMeta


def trace(expert_TLR: Any, experts: int, **columns: Any) -> Trace:
    """A trace of the given experts; of one document and ids 0, 0, ... where not said otherwise.
    `domains`: names."""
    expert_TLR = np.asarray(expert_TLR, np.uint8)
    tokens, layers, _ = expert_TLR.shape
    domains = columns.pop("domains", ())
    zero_T, real_TLR = np.zeros(tokens, np.int32), expert_TLR < experts
    given: dict[str, Any] = {
        "token_T": zero_T,
        "target_T": zero_T,
        "position_T": np.arange(tokens, dtype=np.int32),
        "document_T": zero_T,
        "domain_T": zero_T - (not domains),
        "expert_TLR": expert_TLR,
        "weight_TLR": np.where(real_TLR, 0.5, 0).astype(np.float32),
        "dropped_TLR": np.zeros_like(real_TLR),
        "entropy_TL": np.zeros((tokens, layers), np.float32),
        "margin_TL": np.zeros((tokens, layers), np.float32),
    }
    given |= {name: np.asarray(a, given.get(name, zero_T).dtype) for name, a in columns.items()}
    meta = TraceMeta(experts, tuple(range(layers)), tuple(domains))
    return Trace(meta, **given)


def one_layer(expert_TR: Any, experts: int, **columns: Any) -> Trace:
    """A trace of one layer from [T, R]."""
    return trace(np.asarray(expert_TR)[:, None], experts, **columns)


def uniform(tokens: int, layers: int, experts: int, k: int, seed: int = 0, **columns: Any) -> Trace:
    """Uniform random routing of k different experts a token, in documents of 32 tokens."""
    random = np.random.default_rng(seed)
    expert_TLR = random.random((tokens, layers, experts)).argsort(-1)[..., :k]
    columns.setdefault("document_T", np.arange(tokens) // 32)
    columns.setdefault("token_T", random.integers(0, 40, tokens))
    return trace(expert_TLR, experts, **columns)


def cut(whole: Trace, places: Sequence[int]) -> list[Trace]:
    """The trace in parts that begin at these places."""
    edges = [0, *sorted(places), len(whole)]
    return [whole[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
