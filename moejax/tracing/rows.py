"""From rows of tokens, as models read them, to a trace: real tokens only, one behind the other."""

from typing import Any

import numpy as np

from moejax.tracing.schema import Trace, TraceMeta, index_dtype


def trace_of_rows(meta: TraceMeta, batch: Any, decisions: Any, predicted_BS: Any = None) -> Trace:
    """The trace of one batch, on the host. Its documents are numbered from 0, row by row.

    Args:
      meta: of the trace.
      batch: a `moejax.data.Batch`; what is not valid in it is left out.
      decisions: `moejax.routing.Decisions`, arrays [L, B, S, ...].
      predicted_BS: the model's guesses, or None.
    """
    valid_BS = np.asarray(batch.valid_BS)
    segment_BS, (rows, length) = np.asarray(batch.segment_BS), valid_BS.shape

    def column(a_BS: Any, dtype: Any) -> np.ndarray:
        return np.asarray(a_BS)[valid_BS].astype(dtype)

    def layers(a_LBS: Any, dtype: Any) -> np.ndarray:
        a_BSL = np.moveaxis(np.asarray(a_LBS), 0, 2)
        return a_BSL[valid_BS].astype(dtype)

    # A document, or the part of it that is in a row: a pair (row, segment). Neither ever falls.
    part_T = (np.arange(rows)[:, None] * length + segment_BS)[valid_BS]
    document_T = np.cumsum(np.diff(part_T, prepend=part_T[:1]) > 0)
    domain_BS = np.broadcast_to(np.asarray(batch.domain_B)[:, None], valid_BS.shape)
    return Trace(
        meta=meta,
        token_T=column(batch.tokens_BS, np.int32),
        target_T=column(batch.targets_BS, np.int32),
        position_T=column(batch.position_BS, np.int32),
        document_T=document_T.astype(np.int32),
        domain_T=column(domain_BS, np.int32),
        expert_TLR=layers(decisions.expert_TR, index_dtype(meta.experts)),
        weight_TLR=layers(decisions.weight_TR, np.float32),
        dropped_TLR=layers(decisions.dropped_TR, bool),
        entropy_TL=layers(decisions.entropy_T, np.float32),
        margin_TL=layers(decisions.margin_T, np.float32),
        predicted_T=None if predicted_BS is None else column(predicted_BS, np.int32),
        scores_TLE=None if decisions.scores_TE is None else layers(decisions.scores_TE, np.float16),
    )
