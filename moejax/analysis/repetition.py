"""Does a token go where the token before it went? Within documents, layer by layer."""

import numpy as np

from moejax.analysis.counting import Measured, chosen_TE, ratio, size_TL
from moejax.routing.floors import overlap_floor
from moejax.tracing import Trace, TraceMeta


class Repetition:
    """Sums over the pairs of neighbours of one document, [L].

    The control is the same measure of `documents.shuffled`: a document keeps its experts, only
    their order is drawn.

    Attributes:
      pairs: both have an expert. same: and the same first choice. overlap: an expert in common.
      overlap_chance: sum over pairs of the overlap's probability by chance.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self.pairs_L, self.same_L, self.overlap_L = np.zeros((3, len(meta.layers)), np.int64)
        self.overlap_chance_L = np.zeros(len(meta.layers))
        self.experts = meta.experts

    def add(self, part: Trace) -> None:
        neighbours_T = part.document_T[1:] == part.document_T[:-1]
        first_TL, k_TL = part.expert_TLR[..., 0], size_TL(part)
        pair_TL = neighbours_T[:, None] & (k_TL[1:] > 0) & (k_TL[:-1] > 0)
        self.pairs_L += pair_TL.sum(0)
        self.same_L += (pair_TL & (first_TL[1:] == first_TL[:-1])).sum(0)
        for layer in range(len(self.pairs_L)):
            chosen, pair_T = chosen_TE(part, layer), pair_TL[:, layer]
            self.overlap_L[layer] += (chosen[1:] & chosen[:-1]).any(-1)[pair_T].sum()
            # Few pairs of sizes come up: the chance of each once.
            sizes = np.stack([k_TL[1:, layer], k_TL[:-1, layer]])[:, pair_T]
            for (a, b), n in zip(*np.unique(sizes.T, axis=0, return_counts=True), strict=True):
                self.overlap_chance_L[layer] += n * overlap_floor(self.experts, int(a), int(b))

    def first(self) -> Measured:
        """P(first choice = that of the token before); by chance 1 / E."""
        random_L = np.full(len(self.pairs_L), 1 / self.experts)
        return Measured(ratio(self.same_L, self.pairs_L), random_L)

    def any(self) -> Measured:
        """P(an expert in common with the token before); by chance 1 - C(E - a, b) / C(E, b) for
        tokens of a and b experts."""
        value_L = ratio(self.overlap_L, self.pairs_L)
        return Measured(value_L, ratio(self.overlap_chance_L, self.pairs_L))
