"""Do experts divide the domains among them? From how often each document went to each expert."""

import math

import numpy as np
from scipy.optimize import linear_sum_assignment

from moejax.analysis.counting import Measured, add_counts, ratio
from moejax.routing.floors import max_vio_floor
from moejax.tracing import Trace, TraceMeta

KEPT = 4096  # documents whose labels the control deals anew
DRAWS = 8


def by_domain(load_BLE: np.ndarray, domain_B: np.ndarray, domains: int) -> np.ndarray:
    """Assignments [G, L, E] of each domain, from those of each document (or row); those of domain
    -1 count nowhere."""
    load_GLE = np.zeros((domains, *load_BLE.shape[1:]), np.int64)
    real_B = domain_B >= 0
    np.add.at(load_GLE, domain_B[real_B], load_BLE[real_B])
    return load_GLE


def specialisation(load_GLE: np.ndarray) -> np.ndarray:
    """Total variation distance between a domain's shares of the experts and those of all text, mean
    over the domains that have any, [L]: 0 = every domain uses the experts alike, 1 - 1/G = each of
    G equal domains has experts of its own. See `shuffled` for its value by chance."""
    there_GL = load_GLE.sum(-1) > 0
    off_GL = 0.5 * np.abs(_shares(load_GLE) - _shares(load_GLE.sum(0))).sum(-1)
    return ratio((off_GL * there_GL).sum(0), there_GL.sum(0))


def shuffled(
    load_BLE: np.ndarray, domain_B: np.ndarray, domains: int, draws: int = DRAWS
) -> np.ndarray:
    """`specialisation` where documents have each other's domain: what their lengths and their few
    topics make by chance."""
    random = np.random.default_rng(0)
    real_B = domain_B >= 0
    load_BLE, domain_B = load_BLE[real_B], domain_B[real_B]
    found = [
        specialisation(by_domain(load_BLE, random.permutation(domain_B), domains))
        for _ in range(draws)
    ]
    return np.mean(found, axis=0)


def recovered(load_GLE: np.ndarray) -> np.ndarray:
    """The share of assignments that went to their domain's expert, under the best way to give each
    domain an expert of its own, [L]: 1 = the domains are recovered, 1 / E = routing knows nothing
    of them."""
    shares = []
    for share_GE in np.moveaxis(_shares(load_GLE), 1, 0):
        rows, columns = linear_sum_assignment(-share_GE)
        shares.append(share_GE[rows, columns].sum() / len(share_GE))
    return np.array(shares)


class Domains:
    """Sums over a trace by domain, and the loads of some documents for the control.

    Attributes:
      names: of the domains.
      load_GLE: assignments; token_G: tokens. Tokens of no known domain count nowhere.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self.names, self.experts = meta.domains, meta.experts
        self.load_GLE = np.zeros((len(self.names), len(meta.layers), self.experts), np.int64)
        self.token_G = np.zeros(len(self.names), np.int64)
        self._sample = _Sample()

    def add(self, part: Trace) -> None:
        """A part of whole documents."""
        real_T = part.domain_T >= 0
        add_counts(self.token_G, part.domain_T[real_T])
        _, begin_B, document_T = np.unique(part.document_T, return_index=True, return_inverse=True)
        load_BLE = np.zeros((len(begin_B), *self.load_GLE.shape[1:]), np.int64)
        real_TLR = (part.expert_TLR < self.experts) & real_T[:, None, None]
        token_N, layer_N, _ = np.nonzero(real_TLR)
        add_counts(load_BLE, document_T[token_N], layer_N, part.expert_TLR[real_TLR])
        domain_B = part.domain_T[begin_B]
        self.load_GLE += by_domain(load_BLE, domain_B, len(self.names))
        for load_LE, domain in zip(load_BLE, domain_B, strict=True):
            if domain >= 0:
                self._sample.add(load_LE, int(domain))

    def share_GLE(self) -> np.ndarray:
        """(assignments to an expert from a domain) / (the domain's tokens); by chance K / E
        (Muennighoff et al. 2024, 2409.02060, section 5.3)."""
        return ratio(self.load_GLE, self.token_G[:, None, None])

    def specialisation(self) -> Measured:
        """`specialisation` of all documents.

        By chance sqrt((E - K) (1 / n_g - 1 / n) / (2 pi)), mean over domains of n_g assignments.
        The control gives documents each other's domain, lengths and topics of documents kept; of
        more than KEPT documents a random sample does, its distance brought to the number of all by
        the root of their number.
        """
        load_GL = self.load_GLE.sum(-1).astype(np.float64)
        k_L = ratio(load_GL.sum(0), self.token_G.sum())
        with np.errstate(divide="ignore"):
            spread_GL = np.maximum(self.experts - k_L, 0) * (1 / load_GL - 1 / load_GL.sum(0))
        there_GL = load_GL > 0
        random_GL = np.where(there_GL, np.sqrt(spread_GL / (2 * math.pi)), 0.0)
        random_L = ratio(random_GL.sum(0), there_GL.sum(0))
        value_L = specialisation(self.load_GLE)
        return Measured(value_L, random_L, self._sample.shuffled(len(self.names), len(value_L)))

    def max_vio(self) -> tuple[np.ndarray, np.ndarray]:
        """MaxVio of each domain alone and its value by chance, both [G, L]."""
        load_GL = self.load_GLE.sum(-1)
        value_GL = ratio(self.load_GLE.max(-1) * self.experts, load_GL) - 1
        k_GL = ratio(load_GL, self.token_G[:, None])
        floor_GL = np.full(load_GL.shape, np.nan)
        for at in zip(*np.nonzero(load_GL), strict=True):
            k = max(1.0, float(k_GL[at]))
            floor_GL[at] = max_vio_floor(load_GL[at] / k, self.experts, k)
        return value_GL, floor_GL


class _Sample:
    """A uniform sample of at most KEPT documents (reservoir sampling): load and domain of each."""

    def __init__(self) -> None:
        self.seen = 0
        self._random = np.random.default_rng(0)
        self._kept: list[tuple[np.ndarray, int]] = []

    def add(self, load_LE: np.ndarray, domain: int) -> None:
        self.seen += 1
        if len(self._kept) < KEPT:
            self._kept.append((load_LE.astype(np.int32), domain))
        elif (place := int(self._random.integers(self.seen))) < KEPT:
            self._kept[place] = (load_LE.astype(np.int32), domain)

    def shuffled(self, domains: int, layers: int) -> np.ndarray:
        if not self._kept:
            return np.full(layers, np.nan)
        load_BLE = np.stack([load_LE for load_LE, _ in self._kept])
        domain_B = np.array([domain for _, domain in self._kept])
        return shuffled(load_BLE, domain_B, domains) * math.sqrt(len(self._kept) / self.seen)


def _shares(load_XE: np.ndarray) -> np.ndarray:
    return load_XE / np.maximum(load_XE.sum(-1, keepdims=True), 1)
