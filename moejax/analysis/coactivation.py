"""Which experts work on the same token."""

import numpy as np

from moejax.analysis.counting import Measured, chosen_TE, ratio
from moejax.tracing import Trace, TraceMeta


class Coactivation:
    """Sums over a trace: together_LEE, tokens that have both experts; on the diagonal, the load."""

    def __init__(self, meta: TraceMeta) -> None:
        self.together_LEE = np.zeros((len(meta.layers), meta.experts, meta.experts), np.int64)

    def add(self, part: Trace) -> None:
        for layer, together_EE in enumerate(self.together_LEE):
            chosen = chosen_TE(part, layer).astype(np.float64)
            together_EE += np.rint(chosen.T @ chosen).astype(np.int64)

    @property
    def share_LEE(self) -> np.ndarray:
        """n_ij / n_i: of the tokens of expert i, the share that has j too. Over all pairs of a
        token's experts, so where tokens make K choices a row sums to K - 1; 0 on the diagonal."""
        share_LEE = ratio(self.together_LEE, np.diagonal(self.together_LEE, 0, 1, 2)[..., None])
        share_LEE[:, np.eye(share_LEE.shape[-1], dtype=bool)] = 0.0
        return share_LEE

    def strongest(self) -> Measured:
        """n_ij / n_i with the partner j that is most often there, mean over the experts i that have
        tokens.

        By chance (c - 1) / (E - 1) for every partner, c - 1 others keeping an assignment company (K
        - 1, or sum k_t (k_t - 1) / sum k_t). The control keeps the load of each expert and deals
        the company: (c - 1) n_j / (sum n - n_i).
        """
        load_LE = np.diagonal(self.together_LEE, 0, 1, 2).astype(np.float64)
        total_L1 = load_LE.sum(-1, keepdims=True)
        others_L1 = ratio(self.together_LEE.sum((1, 2))[:, None], total_L1) - 1
        experts = load_LE.shape[-1]
        dealt_LEE = others_L1[..., None] * ratio(
            np.broadcast_to(load_LE[:, None], self.together_LEE.shape),
            (total_L1 - load_LE)[..., None],
        )
        dealt_LEE[:, np.eye(experts, dtype=bool)] = 0.0
        random_L = others_L1[:, 0] / max(1, experts - 1)
        return Measured(_best(self.share_LEE), random_L, _best(np.minimum(dealt_LEE, 1.0)))


def _best(share_LEE: np.ndarray) -> np.ndarray:
    best_LE = share_LEE.max(-1)  # not a number for an expert without tokens
    found_LE = ~np.isnan(best_LE)
    return ratio(np.where(found_LE, best_LE, 0.0).sum(-1), found_LE.sum(-1))
