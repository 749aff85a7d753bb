"""Sizes, skews, which of them are measured, and the arrays of a benchmark: data is passed as
arguments, never folded in."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.dispatch import Experts, Plan, make_plan, route
from moejax.dispatch.trial import Sizes
from moejax.routing import RouterInput, make_router

CAPACITY = 1.25  # the factor of the ways that have one
SKEWS = ("uniform", "zipf", "one")


class Case(NamedTuple):
    """A layer and its load.

    Attributes:
      name: of the line.
      dim, ffn, experts, k, tokens: D, F, E, K, T.
      skew: of the experts' popularity: uniform, zipf (exponent 1), or one: all tokens choose the
        same K experts.
      ways: what is measured besides the dense network.
    """

    name: str
    dim: int
    ffn: int
    experts: int
    k: int
    tokens: int
    skew: str = "uniform"
    ways: tuple[str, ...] = ("dropless",)

    @property
    def flops(self) -> int:
        """Of the forward pass: three matrices on K rows a token. Backward: twice that."""
        return 6 * self.tokens * self.k * self.dim * self.ffn

    @property
    def sizes(self) -> str:
        return f"D{self.dim} F{self.ffn} E{self.experts} K{self.k} T{self.tokens}"

    def experts_of(self, dtype: str) -> Sizes:
        """What the choice among grouped products depends on."""
        return Sizes(self.experts, self.dim, self.ffn, dtype)


LARGE = Case("large", 512, 2048, 16, 2, 8192, ways=("dropless", "experts", "layer"))
SIXTEEN = Case("sixteen", 256, 1024, 16, 2, 4096, ways=("einsum", "gather", "dropless"))
EIGHT = Case("eight", 256, 1024, 8, 2, 4096, ways=("dropless", "ragged_dot"))
CASES = (
    LARGE,
    LARGE._replace(name="large, skewed", skew="zipf", ways=("dropless",)),
    Case("fine-grained", 256, 256, 64, 6, 8192),
    SIXTEEN,
    EIGHT,
)
# A GPU's: widths as published (Mixtral 8x7B's layer, and one of many small experts).
_GROUPED = ("layer", "dropless", "gather", "ragged_dot", "hopper", "tokamax")
GPU_CASES = (
    Case("mixtral", 4096, 14336, 8, 2, 8192, ways=_GROUPED),
    Case("many", 2048, 1024, 64, 8, 8192, ways=_GROUPED),
)
_CENTRE = Case("centre", 256, 512, 16, 2, 4096, ways=("einsum", "gather", "dropless"))


def sweep() -> tuple[Case, ...]:
    """One size after the other is changed, and the load."""
    values: dict[str, tuple[Any, ...]] = {
        "experts": (4, 64, 256),
        "k": (1, 4, 8),
        "dim": (128, 512),
        "ffn": (128, 2048),
        "tokens": (1024, 16384),
        "skew": ("zipf", "one"),
    }
    changed = [
        _CENTRE._replace(name=f"{key} {value}", **{key: value})
        for key, several in values.items()
        for value in several
    ]
    few = _CENTRE._replace(ways=(*_CENTRE.ways, "ragged_dot"))
    return (few, *(case for case in changed))


def wanted(only: Sequence[str], full: bool, gpu: bool) -> tuple[list[Case], bool]:
    """The cases that are measured, and whether the training step is too.

    Raises:
      ValueError: a name that none has.
    """
    cases = [*CASES, *GPU_CASES, *(sweep() if full else ())]
    names = [case.name for case in cases] + ["step"]
    for name in only:
        if name not in names:
            raise ValueError(f"--only: no case {name!r}; there are: {', '.join(sorted(names))}")
    if not only:
        return (list(GPU_CASES), False) if gpu else ([c for c in cases if c not in GPU_CASES], True)
    return [case for case in cases if case.name in only], "step" in only


def narrowed(cases: Sequence[Case], ways: Sequence[str]) -> list[Case]:
    """The cases with these ways only; all ways if none is named.

    Raises:
      ValueError: a way that no case has.
    """
    known = {way for case in cases for way in case.ways}
    for way in ways:
        if way not in known:
            raise ValueError(f"--ways: no line {way!r}; there are: {', '.join(sorted(known))}")
    return [c._replace(ways=tuple(w for w in c.ways if w in ways or not ways)) for c in cases]


def passes(cases: Sequence[Case], full: bool) -> list[tuple[Case, bool]]:
    """(case, both): of all cases forward and backward; of some the forward pass alone too."""
    alone = [case for case in cases if full or case == SIXTEEN or case in GPU_CASES]
    return [*((case, True) for case in cases), *((case, False) for case in alone)]


def weights(case: Case, experts: int | None = None, dtype: Any = jnp.float32) -> Experts:
    """Random SwiGLU experts."""
    e, d, f = experts or case.experts, case.dim, case.ffn
    keys = jax.random.split(jax.random.key(0), 3)
    return Experts(
        (jax.random.normal(keys[0], (e, d, f)) / d**0.5).astype(dtype),
        (jax.random.normal(keys[1], (e, f, d)) / f**0.5).astype(dtype),
        (jax.random.normal(keys[2], (e, d, f)) / d**0.5).astype(dtype),
    )


def rows(case: Case, number: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(2), (number, case.dim)).astype(dtype)


def plan_of(case: Case, capacity: float | None = None) -> Plan:
    """A top-k plan of random tokens, as the case's skew has it."""
    exponent = {"uniform": 0.0, "zipf": 1.0, "one": 100.0}[case.skew]
    popularity_E = -exponent * jnp.log(jnp.arange(1, case.experts + 1))
    noise_TE = jax.random.gumbel(jax.random.key(1), (case.tokens, case.experts))
    r = RouterInput(popularity_E[None] + noise_TE, jnp.ones(case.tokens, bool))
    return make_plan(route(make_router("topk", {"k": case.k}).route, r, 1, "batch"), capacity)
