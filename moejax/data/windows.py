"""Rows of tokens cut from packed streams, with the masks that keep documents apart.

Window i of a stream holds its tokens i*S .. i*S + S: S inputs and, one further on, S targets. Each
token is a target in exactly one window. The last window of a domain is padded with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moejax.data.tokenizer import SEPARATOR

PADDED_ROW = -1  # the index, and the domain, of a row that only fills up a batch
UNSCORED = -1  # the target of a token that has none


class Batch(NamedTuple):
    """Rows of one process, as numpy arrays.

    tokens_BS: int32 inputs; 0 separates documents and pads.
    targets_BS: int32, the next token of each input; or, where tokens are masked, what those were,
      and UNSCORED for all others.
    segment_BS: int32, number of the document inside the row; attention stays inside a document.
      A separator belongs to the document that it ends.
    position_BS: int32, position inside the document, counted from where the row or the document
      begins.
    valid_BS: bool, True = a real token, neither a separator nor padding: it is routed, and its
      target counts if it has one. So a document's first token does not count as a target, which
      nothing before it predicts, while a separator does: it ends a document.
    domain_B: int32, index into TextDataset.domains; -1 for a row that is padding.
    """

    tokens_BS: np.ndarray
    targets_BS: np.ndarray
    segment_BS: np.ndarray
    position_BS: np.ndarray
    valid_BS: np.ndarray
    domain_B: np.ndarray


class Windows:
    """All windows of one split, numbered domain after domain."""

    def __init__(self, streams: Sequence[np.ndarray], sequence: int) -> None:
        self.streams = streams
        self.sequence = sequence
        # len - 1 tokens of a stream are targets; the last window may be short of some
        self.count_D = np.array([-(-max(len(s) - 1, 0) // sequence) for s in streams], np.int64)
        self._end_D = np.cumsum(self.count_D)

    def __len__(self) -> int:
        return int(self.count_D.sum())

    def rows(self, index_B: Sequence[int] | np.ndarray) -> Batch:
        """Returns the windows with these numbers, in this order; -1 gives a padded row."""
        index_B = np.asarray(index_B, np.int64)
        domain_B = np.searchsorted(self._end_D, index_B, side="right").astype(np.int32)
        domain_B[index_B == PADDED_ROW] = PADDED_ROW
        window_BT = np.full((len(index_B), self.sequence + 1), SEPARATOR, np.int32)
        for row, domain, index in zip(window_BT, domain_B, index_B, strict=True):
            if domain != PADDED_ROW:
                first = self._end_D[domain] - self.count_D[domain]
                start = (index - first) * self.sequence
                part = self.streams[domain][start : start + self.sequence + 1]
                row[: len(part)] = part
        return predicting_next(window_BT, domain_B)


def predicting_next(window_BT: np.ndarray, domain_B: np.ndarray) -> Batch:
    """Returns the batch of windows of S + 1 tokens: int32 [B, S + 1] and [B]."""
    tokens_BS, targets_BS = window_BT[:, :-1], window_BT[:, 1:]
    # padding is made of separators, so one rule serves both: from a separator nothing is predicted
    separator_BS = tokens_BS == SEPARATOR
    begins_BS = np.zeros_like(separator_BS)
    begins_BS[:, 1:] = separator_BS[:, :-1]
    index_S = np.arange(tokens_BS.shape[1], dtype=np.int32)
    begin_BS = np.maximum.accumulate(np.where(begins_BS, index_S, 0), axis=1)
    return Batch(
        tokens_BS=tokens_BS,
        targets_BS=targets_BS,
        segment_BS=np.cumsum(begins_BS, axis=1, dtype=np.int32),
        position_BS=index_S - begin_BS,
        valid_BS=~separator_BS,
        domain_B=domain_B,
    )


def balanced_order(count_D: np.ndarray, limit: int = 0) -> np.ndarray:
    """Returns window numbers [rows], the domains taking turns until one has no more.

    limit: how many rows at most, 0 for all. The windows of a domain are taken at even distances, so
    a limit does not mean its first documents only.
    """
    share_D = np.array(shares(count_D, limit))
    first_D = np.cumsum(count_D) - count_D
    domain_R = np.repeat(np.arange(len(count_D)), share_D)
    turn_R = np.concatenate([np.arange(share) for share in share_D])
    window_R = first_D[domain_R] + turn_R * count_D[domain_R] // share_D[domain_R]
    return window_R[np.lexsort((domain_R, turn_R))]


def shares(count_D: np.ndarray, limit: int = 0) -> list[int]:
    """Shares `limit` rows out evenly; what a small domain cannot fill goes to the others."""
    left = min(limit, int(count_D.sum())) if limit else int(count_D.sum())
    share_D = [0] * len(count_D)
    by_size = sorted(range(len(count_D)), key=lambda domain: (count_D[domain], -domain))
    for rank, domain in enumerate(by_size):
        share_D[domain] = min(int(count_D[domain]), left // (len(count_D) - rank))
        left -= share_D[domain]
    return share_D
