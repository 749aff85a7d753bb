"""All measures of one trace, in one pass over its parts."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from moejax.analysis.coactivation import Coactivation
from moejax.analysis.counting import Measured
from moejax.analysis.documents import shuffled, whole_documents
from moejax.analysis.domains import Domains
from moejax.analysis.load import Load
from moejax.analysis.predictability import Predictability
from moejax.analysis.repetition import Repetition
from moejax.analysis.vocabulary import IDS, Vocabulary
from moejax.tracing import Trace, TraceMeta


class Measure(Protocol):
    def add(self, part: Trace) -> None: ...


class Measures:
    """The accumulators; each is its own file's. `*_shuffled` see the shuffled trace."""

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.load = Load(meta)
        self.domains = Domains(meta)
        self.vocabulary = {ids: Vocabulary(meta, ids) for ids in IDS}
        self.coactivation = Coactivation(meta)
        self.repetition, self.repetition_shuffled = Repetition(meta), Repetition(meta)
        self.predictability, self.predictability_shuffled = (
            Predictability(meta),
            Predictability(meta),
        )
        self.documents = 0
        self._random = np.random.default_rng(0)

    def add(self, part: Trace) -> None:
        """A part of whole documents, behind all that were added before."""
        self.documents += len(np.unique(part.document_T))
        measures: list[Measure] = [self.load, self.domains, self.coactivation]
        measures += [self.repetition, self.predictability, *self.vocabulary.values()]
        for measure in measures:
            measure.add(part)
        dealt = shuffled(part, self._random)
        self.repetition_shuffled.add(dealt)
        self.predictability_shuffled.add(dealt)

    def figures(self) -> dict[str, Measured]:
        """Every figure by name; those between layers have L - 1 values. Without domains, or without
        predicted ids, theirs are not there."""
        repeated, dealt = self.repetition, self.repetition_shuffled
        predicted, mixed = self.predictability, self.predictability_shuffled
        found = {
            "max_vio": self.load.max_vio(),
            "cv": self.load.variation(),
            "load_entropy": self.load.entropy(),
            "dead": self.load.dead(),
            "coactivation": self.coactivation.strongest(),
            "repetition_first": _held(repeated.first(), dealt.first()),
            "repetition_any": _held(repeated.any(), dealt.any()),
            "predictability": _held(predicted.accuracy(), mixed.accuracy()),
            "information": _held(predicted.information(), mixed.information()),
        }
        for ids, vocabulary in self.vocabulary.items():
            if vocabulary.count_V.sum():
                found[f"vocabulary_{ids}"] = vocabulary.specialisation()
        if (self.domains.token_G > 0).sum() > 1:
            found["domains"] = self.domains.specialisation()
        return found


def measure(parts: Iterable[Trace]) -> Measures:
    """The measures of a trace.

    Raises:
      ValueError: the trace has no tokens, or its model no layers with experts.
    """
    measures: Measures | None = None
    for part in whole_documents(parts):
        if measures is None:
            if not part.meta.layers or not part.meta.experts:
                raise ValueError("the trace has no layer with experts: there is no routing in it")
            measures = Measures(part.meta)
        measures.add(part)
    if measures is None:
        raise ValueError(
            "the trace has no tokens: nothing was routed, so there is nothing to measure"
        )
    return measures


def _held(value: Measured, against: Measured) -> Measured:
    return value._replace(shuffled=against.value)
