"""How evenly the experts are used: load, MaxVio, dead experts, and how many a token has."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moejax.analysis.counting import Measured, add_counts, ratio, size_TL
from moejax.routing.floors import cv_floor, load_entropy_floor, max_vio_floor
from moejax.routing.metrics import coefficient_of_variation, max_vio, normalised_entropy
from moejax.tracing import Trace, TraceMeta

STARVED = 0.01  # of the mean load


class Load:
    """Sums over a trace.

    Attributes:
      tokens: T.
      load_LE, first_LE, kept_LE: assignments, first choices, assignments that were not dropped.
      size_LX: tokens with X = 0 .. E experts.
    """

    def __init__(self, meta: TraceMeta) -> None:
        layers, self.experts = len(meta.layers), meta.experts
        self.tokens = 0
        self.load_LE, self.first_LE, self.kept_LE = np.zeros((3, layers, self.experts), np.int64)
        self.size_LX = np.zeros((layers, self.experts + 1), np.int64)

    def add(self, part: Trace) -> None:
        self.tokens += len(part)
        layer_L = np.arange(len(part.meta.layers))
        add_counts(self.size_LX, layer_L[None], size_TL(part))
        real_TLR = part.expert_TLR < self.experts
        for load_LE, which_TLR in (
            (self.load_LE, real_TLR),
            (self.first_LE, real_TLR & (np.arange(real_TLR.shape[-1]) == 0)),
            (self.kept_LE, real_TLR & ~part.dropped_TLR),
        ):
            add_counts(load_LE, np.nonzero(which_TLR)[1], part.expert_TLR[which_TLR])

    @property
    def mean_size_L(self) -> np.ndarray:
        """k, experts a token: the K of a router that always makes K choices."""
        return ratio(self.load_LE.sum(-1), self.tokens)

    @property
    def company_L(self) -> np.ndarray:
        """How many experts the token of a random assignment has, sum k_t^2 / sum k_t: K again where
        it is always K. Floors take it for K where sizes differ."""
        squares_L = self.size_LX @ np.arange(self.experts + 1.0) ** 2
        return ratio(squares_L, self.load_LE.sum(-1))

    def max_vio(self) -> Measured:
        """max n / mean n - 1 over the whole trace."""
        return self._measured(max_vio, max_vio_floor)

    def variation(self) -> Measured:
        """Population standard deviation of the load / its mean."""
        return self._measured(coefficient_of_variation, cv_floor)

    def entropy(self) -> Measured:
        """Entropy of the load / ln E."""
        return self._measured(normalised_entropy, load_entropy_floor)

    def dead(self) -> Measured:
        """Share of experts that nobody chose; by chance, product over tokens of 1 - k_t / E."""
        with np.errstate(divide="ignore", invalid="ignore"):
            miss_LX = self.size_LX * np.log1p(-np.arange(self.experts + 1.0) / self.experts)
        missed_L = np.exp(np.where(self.size_LX > 0, miss_LX, 0.0).sum(-1))
        return Measured((self.load_LE == 0).mean(-1), missed_L)

    def starved(self) -> np.ndarray:
        """Share of experts [L] with less than 1 % of the mean load."""
        return (self.load_LE < STARVED * self.load_LE.mean(-1, keepdims=True)).mean(-1)

    def dropped(self) -> np.ndarray:
        """Share of assignments [L] that found their expert full."""
        return 1 - ratio(self.kept_LE.sum(-1), self.load_LE.sum(-1))

    def _measured(
        self,
        figure: Callable[[jax.Array], jax.Array],
        floor: Callable[[float, int, float], float],
    ) -> Measured:
        """A figure of the load, and its floor(tokens, E, K) for as many assignments in the same
        company."""
        assigned_L, company_L = self.load_LE.sum(-1), self.company_L
        random_L = np.full(len(assigned_L), np.nan)
        for layer in np.nonzero(assigned_L)[0]:
            k = float(company_L[layer])
            random_L[layer] = floor(assigned_L[layer] / k, self.experts, k)
        # float32 before JAX sees it: its integers end at 2^31
        value_L = np.asarray(figure(jnp.asarray(self.load_LE, jnp.float32)), np.float64)
        return Measured(np.where(assigned_L > 0, value_L, np.nan), random_L)
