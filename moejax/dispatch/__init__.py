"""Dispatch: three ways to move tokens to their experts and back, one result."""

from collections.abc import Callable

import jax

from moejax.dispatch.dropless import dropless
from moejax.dispatch.einsum import einsum
from moejax.dispatch.experts import ACTIVATIONS, Experts, experts_batched, experts_grouped
from moejax.dispatch.gather import gather
from moejax.dispatch.grouped import grouped_ffn
from moejax.dispatch.local import route_and_plan
from moejax.dispatch.parallel import expert_specs
from moejax.dispatch.plan import GROUPS, Plan, capacity, make_plan, num_groups, route
from moejax.dispatch.shards import BATCH_AXES, Shards, mesh_shards
from moejax.dispatch.shared import Shared, shared_beside, shared_specs

DISPATCH: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "einsum": einsum,
    "gather": gather,
    "dropless": dropless,
}


__all__ = [
    "ACTIVATIONS",
    "BATCH_AXES",
    "DISPATCH",
    "GROUPS",
    "Experts",
    "Plan",
    "Shared",
    "Shards",
    "capacity",
    "dropless",
    "einsum",
    "experts_batched",
    "expert_specs",
    "experts_grouped",
    "gather",
    "grouped_ffn",
    "make_plan",
    "mesh_shards",
    "num_groups",
    "route",
    "route_and_plan",
    "shared_beside",
    "shared_specs",
]
