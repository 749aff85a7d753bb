"""What a trace of routing holds, whatever framework made it: which token went where, in columns."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np


def index_dtype(experts: int) -> Any:
    """Of an expert's number: the smallest dtype that holds 0 .. E."""
    return np.uint8 if experts <= 255 else np.uint16


@dataclasses.dataclass(frozen=True)
class TraceMeta:
    """What all parts of a trace share.

    Attributes:
      experts: E.
      layers: the model's layers that have experts, bottom to top, by their number.
      domains: names that domain_T counts; () = the text has none.
      vocabulary: V, and `tokenizer` the identity of what made the ids; "" = unknown.
      source: who routed: 'moejax', 'transformers', ...
    """

    experts: int
    layers: tuple[int, ...]
    domains: tuple[str, ...] = ()
    vocabulary: int = 0
    tokenizer: str = ""
    source: str = "moejax"


@dataclasses.dataclass(frozen=True)
class Trace:
    """T tokens in the order of the text, L layers with experts, at most R assignments a token.

    Attributes:
      meta: see there.
      token_T: int32, the input id.
      target_T: int32, the id that follows.
      position_T: int32, place in the document, from 0 where the row or the document begins.
      document_T: int32, a number for each document, or part of one in a row; rises along T.
      domain_T: int32, index into meta.domains; -1 = unknown.
      expert_TLR: uint8, or uint16 where E > 255; best first, E = none.
      weight_TLR: float32, 0 where none.
      dropped_TLR: bool, assigned but found the expert full.
      entropy_TL: float32, of the router's normalised scores in nats.
      margin_TL: float32, least score of a chosen expert minus the greatest of one not chosen:
        small = fragile, negative = a bias or a limit overruled the scores; NaN where none is
        chosen, or all are.
      predicted_T: int32, the model's best guess for target_T; None = not kept.
      scores_TLE: float16 scores of all experts, for the viewer; None = not kept.
    """

    meta: TraceMeta
    token_T: np.ndarray
    target_T: np.ndarray
    position_T: np.ndarray
    document_T: np.ndarray
    domain_T: np.ndarray
    expert_TLR: np.ndarray
    weight_TLR: np.ndarray
    dropped_TLR: np.ndarray
    entropy_TL: np.ndarray
    margin_TL: np.ndarray
    predicted_T: np.ndarray | None = None
    scores_TLE: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where the columns do not fit each other."""
        tokens, layers = len(self.token_T), len(self.meta.layers)
        for name, column in self.columns():
            want = (tokens, layers)[: 2 if "L" in name.rpartition("_")[2] else 1]
            if column.shape[: len(want)] != want:
                raise ValueError(f"trace: {name} is of shape {column.shape}, wanted {want} + ...")

    def columns(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) of each column that is there; every one begins with T."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                yield field.name, value

    def __len__(self) -> int:
        return len(self.token_T)

    def __getitem__(self, rows: slice) -> "Trace":
        """A run of its tokens."""
        return _replaced(self, {name: a[rows] for name, a in self.columns()})


def concatenate(parts: list[Trace]) -> Trace:
    """Parts of one trace behind each other. Raises ValueError where there is none."""
    if not parts:
        raise ValueError("a trace of no tokens: nothing was routed")
    names = [name for name, _ in parts[0].columns()]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return _replaced(parts[0], joined)


def _replaced(trace: Trace, columns: dict[str, Any]) -> Trace:
    return dataclasses.replace(trace, **columns)
