"""How early a router settles: what an earlier checkpoint chose of what the last one chooses."""

import numpy as np

from moejax.analysis.counting import Measured, chosen_TE, ratio
from moejax.tracing import Trace, TraceMeta


class Saturation:
    """Sums over the tokens that two checkpoints routed, [L]: assignments of the last one, those of
    them that the earlier one made too, and how many of them chance would find."""

    def __init__(self, meta: TraceMeta) -> None:
        self.last_L, self.common_L = np.zeros((2, len(meta.layers)), np.int64)
        self.chance_L = np.zeros(len(meta.layers))

    def add(self, earlier: Trace, last: Trace) -> None:
        """Raises ValueError where the two parts are of other tokens."""
        if not np.array_equal(earlier.token_T, last.token_T):
            raise ValueError(
                f"saturation compares two checkpoints on the same text: these parts hold "
                f"{len(earlier)} and {len(last)} tokens, not the same ones"
            )
        for layer in range(len(self.last_L)):
            before, after = chosen_TE(earlier, layer), chosen_TE(last, layer)
            self.common_L[layer] += (before & after).sum()
            self.last_L[layer] += after.sum()
            self.chance_L[layer] += (before.mean(-1) * after.sum(-1)).sum()

    def saturation(self) -> Measured:
        """Share of the last checkpoint's assignments that stood already (Muennighoff et al. 2024,
        2409.02060, section 5.1); by chance K / E, or what the earlier one's sizes give."""
        return Measured(ratio(self.common_L, self.last_L), ratio(self.chance_L, self.last_L))
