"""Does a token's id decide where it goes? Input, target or predicted ids."""

import numpy as np

from moejax.analysis.counting import Measured, add_counts, ratio
from moejax.tracing import Trace, TraceMeta

IDS = {"input": "token_T", "target": "target_T", "predicted": "predicted_T"}


class Vocabulary:
    """Sums over a trace by id: load_VLE, assignments, and count_V, occurrences.

    Its memory is V x L x E counts; it grows with the ids seen where the trace does not know V.
    """

    def __init__(self, meta: TraceMeta, ids: str = "input") -> None:
        """ids: which ids, of IDS."""
        self.column, self.experts = IDS[ids], meta.experts
        self.count_V = np.zeros(meta.vocabulary, np.int64)
        self.load_VLE = np.zeros((meta.vocabulary, len(meta.layers), self.experts), np.int32)

    def add(self, part: Trace) -> None:
        """A part that does not keep these ids adds nothing."""
        id_T = getattr(part, self.column)
        if id_T is None or not len(id_T):
            return
        if (new := int(id_T.max()) + 1 - len(self.count_V)) > 0:
            self.count_V = np.pad(self.count_V, (0, new))
            self.load_VLE = np.pad(self.load_VLE, ((0, new), (0, 0), (0, 0)))
        add_counts(self.count_V, id_T)
        real_TLR = part.expert_TLR < self.experts
        token_N, layer_N, _ = np.nonzero(real_TLR)
        add_counts(self.load_VLE, id_T[token_N], layer_N, part.expert_TLR[real_TLR])

    def specialisation(self) -> Measured:
        """Share of a token's experts that another occurrence of its id has too: 1 = the id decides.

        Over all pairs of different occurrences of an id, ids weighed by their assignments:
        sum_ve n_ve (n_ve - 1) / (n_v - 1) over sum_ve n_ve. Ids that occur once say nothing and
        count nowhere, so a rare id does not look special. It is the mean of n_ve / n_v
        (Muennighoff et al. 2024, 2409.02060, section 5.4) over the assignments, each id's own
        occurrence left out. By chance K / E. The control deals the ids anew among all tokens: its
        mean over all deals is sum_e n_e (n_e - 1) / ((T - 1) sum_e n_e).
        """
        tokens = int(self.count_V.sum())
        by_layer = [self._agreement(layer, tokens) for layer in range(self.load_VLE.shape[1])]
        value_L, random_L, shuffled_L = np.array(by_layer, np.float64).reshape(-1, 3).T
        return Measured(value_L, random_L, shuffled_L)

    def _agreement(self, layer: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value, chance and control of one layer."""
        again_V = self.count_V > 1
        load_VE = self.load_VLE[again_V, layer].astype(np.float64)
        shared_V = (load_VE * (load_VE - 1)).sum(-1) / (self.count_V[again_V] - 1)
        load_E = self.load_VLE[:, layer].sum(0, dtype=np.float64)
        return (
            ratio(shared_V.sum(), load_VE.sum()),
            ratio(load_E.sum(), tokens * self.experts),
            ratio((load_E * (load_E - 1)).sum(), max(0, tokens - 1) * load_E.sum()),
        )

    def covered(self) -> float:
        """Share of the tokens whose id occurs more than once."""
        return float(self.count_V[self.count_V > 1].sum() / max(1, int(self.count_V.sum())))

    def favourites(self, layer: int, expert: int, most: int, least: int) -> list[tuple[int, float]]:
        """(id, n_ve / n_v) of the ids that most surely go to an expert, at most `most` of those
        that occur at least `least` times; the more frequent first where equally sure."""
        share_V = ratio(self.load_VLE[:, layer, expert], self.count_V)
        share_V = np.where(self.count_V >= least, share_V, 0.0)
        order_V = np.lexsort((-self.count_V, -share_V))[:most]
        return [(int(v), float(share_V[v])) for v in order_V if share_V[v] > 0]
