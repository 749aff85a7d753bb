"""Dispatch: three ways to move tokens to their experts and back, one result."""

from collections.abc import Callable

import jax

from moejax.dispatch.dropless import dropless
from moejax.dispatch.einsum import einsum
from moejax.dispatch.experts import ACTIVATIONS, Experts, experts_batched, experts_grouped
from moejax.dispatch.gather import gather
from moejax.dispatch.grouped import grouped_ffn
from moejax.dispatch.plan import GROUPS, Plan, capacity, make_plan, route

DISPATCH: dict[str, Callable[[Experts, jax.Array, Plan, str], tuple[jax.Array, jax.Array]]] = {
    "einsum": einsum,
    "gather": gather,
    "dropless": dropless,
}

__all__ = [
    "ACTIVATIONS",
    "DISPATCH",
    "GROUPS",
    "Experts",
    "Plan",
    "capacity",
    "dropless",
    "einsum",
    "experts_batched",
    "experts_grouped",
    "gather",
    "grouped_ffn",
    "make_plan",
    "route",
]
