"""Traces cut between documents, and the control for all that neighbours say about each other."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from moejax.tracing import Trace, concatenate


def whole_documents(parts: Iterable[Trace]) -> Iterator[Trace]:
    """The same trace cut so that no document lies in two parts: the last one of a part waits for
    the next part."""
    waiting: list[Trace] = []
    for part in parts:
        if not len(part):
            continue
        begins = int(np.searchsorted(part.document_T, part.document_T[-1]))
        if begins or (waiting and waiting[-1].document_T[-1] != part.document_T[0]):
            yield concatenate([*waiting, part[:begins]])
            waiting = []
        waiting.append(part[begins:])
    if waiting:
        yield concatenate(waiting)


def shuffled(part: Trace, random: np.random.Generator) -> Trace:
    """The same text with each layer's routing dealt anew among the tokens of a document, layers
    apart.

    A document keeps its experts and how often it uses them; their order, and what one layer's
    choice says of another's, is gone. One generator for all parts: the deal does not depend on
    where the trace was cut, as long as no document was.
    """
    draw_TL = random.random((len(part), len(part.meta.layers)))
    order_TL = np.stack([np.lexsort((draw_T, part.document_T)) for draw_T in draw_TL.T], axis=1)
    columns = {
        name: np.take_along_axis(a_TLR, order_TL[..., None], axis=0)
        for name, a_TLR in part.columns()
        if name.endswith("_TLR")
    }
    return dataclasses.replace(part, **columns)  # type: ignore[arg-type]
