"""Counts of a trace's columns, and what a figure has to be held against.

A measure is fed the parts of a trace, one after another, each of whole documents (see
`moejax.analysis.documents`). It keeps sums only, so its memory does not grow with the text, and
what it says does not depend on where the trace was cut. All of them look at what the router
assigned, before an expert was found full. A token may have any number of experts, none too: A_t is
their set, k_t = |A_t|. *By chance* means that every token keeps its k_t and draws which experts
they are uniformly, tokens and layers apart.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moejax.tracing import Trace


class Measured(NamedTuple):
    """A figure of each layer, float64 [L], beside what it is without what it looks for.

    Attributes:
      value: as measured; not a number where a layer assigned nothing.
      random: by chance, in closed form.
      shuffled: of the same routing and text, dealt anew; each measure says how. None = it has none.
    """

    value: np.ndarray
    random: np.ndarray
    shuffled: np.ndarray | None = None


def chosen_TE(part: Trace, layer: int) -> np.ndarray:
    """bool [T, E]: which experts a layer (by its place in the trace) assigned to each token."""
    experts = part.meta.experts
    chosen = np.zeros((len(part), experts + 1), bool)
    expert_TR = part.expert_TLR[:, layer].astype(np.int64)
    np.put_along_axis(chosen, np.minimum(expert_TR, experts), True, axis=1)
    return chosen[:, :experts]


def size_TL(part: Trace) -> np.ndarray:
    """int64 [T, L]: how many experts each token has."""
    return (part.expert_TLR < part.meta.experts).sum(-1)


def add_counts(n: np.ndarray, *index: np.ndarray) -> None:
    """n[index] += 1 for every place of the broadcast indices, places that come twice too."""
    flat = np.ravel_multi_index(np.broadcast_arrays(*index), n.shape)
    np.add.at(n.reshape(-1), flat.reshape(-1), 1)


def ratio(above: ArrayLike, below: ArrayLike) -> np.ndarray:
    """above / below in float64; not a number where there is nothing below."""
    below = np.asarray(below, np.float64)
    return np.asarray(above, np.float64) / np.where(below > 0, below, np.nan)
