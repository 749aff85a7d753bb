"""How much a layer's first choice says about the next layer's."""

import numpy as np

from moejax.analysis.counting import Measured, add_counts, ratio
from moejax.tracing import Trace, TraceMeta


class Predictability:
    """Sums over a trace: joint_LHEE, tokens by the first choices of layer l and l + 1, in the two
    halves H of the documents. L - 1 pairs of layers; tokens without an expert in either count
    nowhere.

    The control is the same measure of `documents.shuffled`: which documents use which experts
    stays, which token does is drawn in each layer.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self.experts = meta.experts
        shape = (max(0, len(meta.layers) - 1), 2, meta.experts, meta.experts)
        self.joint_LHEE = np.zeros(shape, np.int64)

    def add(self, part: Trace) -> None:
        first_TL = part.expert_TLR[..., 0].astype(np.int64)
        below_TL, above_TL = first_TL[:, :-1], first_TL[:, 1:]
        real_TL = (below_TL < self.experts) & (above_TL < self.experts)
        token_N, layer_N = np.nonzero(real_TL)
        half_N = _half(part.document_T)[token_N]
        add_counts(self.joint_LHEE, layer_N, half_N, below_TL[real_TL], above_TL[real_TL])

    def information(self) -> Measured:
        """Mutual information of the two choices / the entropy of the upper one: 0 = the lower one
        says nothing, 1 = it says all. Of all tokens, so by chance it is not 0 but about (E - 1)^2 /
        (2 T ln E)."""
        joint_LEE = self.joint_LHEE.sum(1)
        total_L = joint_LEE.sum((1, 2))
        upper_L = _entropy(joint_LEE.sum(1))
        both_L = _entropy(joint_LEE.reshape(-1, self.experts**2))
        # Not below 0 by rounding.
        mutual_L = np.maximum(0.0, _entropy(joint_LEE.sum(2)) + upper_L - both_L)
        bias_L = ratio((self.experts - 1) ** 2, 2 * total_L)
        random_L = np.minimum(1.0, bias_L / np.log(max(2, self.experts)))
        return Measured(ratio(mutual_L, upper_L), random_L)

    def accuracy(self) -> Measured:
        """How often the best table from the lower choice to the upper one is right, made from one
        half of the documents and asked about the other, both ways; by chance 1 / E."""
        right_L, asked_L = self._asked(self.joint_LHEE)
        random_L = np.full(len(right_L), 1 / self.experts)
        return Measured(ratio(right_L, asked_L), random_L)

    def most_frequent(self) -> np.ndarray:
        """`accuracy` [L - 1] of the upper layer's most frequent first choice: what a table has to
        beat where the load is uneven."""
        right_L, asked_L = self._asked(self.joint_LHEE.sum(2, keepdims=True))
        return ratio(right_L, asked_L)

    def _asked(self, joint_LHXE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a table X -> E of the other half gets right, and out of how many."""
        best_LHX1 = joint_LHXE[:, ::-1].argmax(-1)[..., None]
        right_LHX1 = np.take_along_axis(joint_LHXE, best_LHX1, axis=-1)
        return right_LHX1.sum((1, 2, 3)), joint_LHXE.sum((1, 2, 3))


def _half(document_T: np.ndarray) -> np.ndarray:
    """0 or 1, by a hash: documents of several domains may take turns, so parity would not do."""
    return (document_T.astype(np.uint64) * np.uint64(2654435761) >> np.uint64(16)) & np.uint64(1)


def _entropy(n_LX: np.ndarray) -> np.ndarray:
    """Nats [L]."""
    share_LX = n_LX / np.maximum(n_LX.sum(-1, keepdims=True), 1)
    return -(share_LX * np.log(np.where(share_LX > 0, share_LX, 1.0))).sum(-1)
