"""Do experts divide the domains among them? From how often each row of text went to each expert."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def by_domain(load_BLE: np.ndarray, domain_B: np.ndarray, domains: int) -> np.ndarray:
    """Assignments [G, L, E] of each domain, from those of each row; rows of domain -1 count
    nowhere."""
    load_GLE = np.zeros((domains, *load_BLE.shape[1:]), np.int64)
    real_B = domain_B >= 0
    np.add.at(load_GLE, domain_B[real_B], load_BLE[real_B])
    return load_GLE


def specialisation(load_GLE: np.ndarray) -> float:
    """Total variation distance between a domain's shares of the experts and those of all text, mean
    over domains and layers: 0 = every domain uses the experts alike, 1 - 1/G = each of G equal
    domains has experts of its own. See `shuffled` for its value by chance."""
    share_GLE = _shares(load_GLE)
    return float(0.5 * np.abs(share_GLE - _shares(load_GLE.sum(0))).sum(-1).mean())


def shuffled(load_BLE: np.ndarray, domain_B: np.ndarray, domains: int, draws: int = 8) -> float:
    """`specialisation` where rows have each other's domain: what the lengths of the rows and their
    few topics make by chance."""
    random = np.random.default_rng(0)
    real_B = domain_B >= 0
    load_BLE, domain_B = load_BLE[real_B], domain_B[real_B]
    found = [
        specialisation(by_domain(load_BLE, random.permutation(domain_B), domains))
        for _ in range(draws)
    ]
    return float(np.mean(found))


def recovered(load_GLE: np.ndarray) -> float:
    """The share of assignments that went to their domain's expert, under the best way to give each
    domain an expert of its own, in the best layer: 1 = the domains are recovered, 1 / E = routing
    knows nothing of them."""
    shares = []
    for share_GE in np.moveaxis(_shares(load_GLE), 1, 0):
        rows, columns = linear_sum_assignment(-share_GE)
        shares.append(share_GE[rows, columns].sum() / len(share_GE))
    return float(max(shares))


def _shares(load_XE: np.ndarray) -> np.ndarray:
    return load_XE / np.maximum(load_XE.sum(-1, keepdims=True), 1)
