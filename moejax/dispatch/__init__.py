"""Dispatch: three ways to move tokens to their experts and back, one result."""

from collections.abc import Callable

import jax

from moejax.dispatch.dropless import dropless
from moejax.dispatch.einsum import einsum
from moejax.dispatch.experts import ACTIVATIONS, Experts, experts_batched, experts_grouped
from moejax.dispatch.gather import gather
from moejax.dispatch.grouped import grouped_ffn
from moejax.dispatch.parallel import BATCH_AXES, Bounds, expert_parallel
from moejax.dispatch.plan import GROUPS, Plan, capacity, make_plan, route

DISPATCH: dict[str, Callable[[Experts, jax.Array, Plan, str], tuple[jax.Array, jax.Array]]] = {
    "einsum": einsum,
    "gather": gather,
    "dropless": dropless,
}


def run_experts(
    dispatch: str, p: Experts, x_TD: jax.Array, plan: Plan, activation: str, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    """y_TD and output_ED by one of DISPATCH; where a mesh is set that cuts the batch, each device
    works on its own tokens, with the experts spread over the `expert` axis. Left to itself the
    compiler's partitioner gives every device all tokens; it does well with `einsum` only."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = all(axis in mesh.shape for axis in (*BATCH_AXES, "tensor"))
    cut = ours and mesh.size > mesh.shape["tensor"]
    if not cut or dispatch == "einsum":
        return DISPATCH[dispatch](p, x_TD, plan, activation)
    return expert_parallel(p, x_TD, plan, activation, dispatch=dispatch, bounds=bounds)


__all__ = [
    "ACTIVATIONS",
    "DISPATCH",
    "GROUPS",
    "Bounds",
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
    "run_experts",
]
