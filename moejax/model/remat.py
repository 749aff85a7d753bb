"""What of a layer is kept for its backward pass; the rest is computed again there."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# Whatever router it is: choices are what `top_k` returns, the orders of rows what `sort` does, and
# the spine names the logits that both come from.
_ROUTING = jax.checkpoint_policies.save_only_these_names("routing")


def _is_routing(primitive: Any, *arguments: Any, **options: Any) -> Any:
    if primitive in (lax.top_k_p, lax.sort_p):
        return True
    return _ROUTING(primitive, *arguments, **options)


_POLICIES: dict[str, Callable[..., Any]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "routing": _is_routing,
}


def rematerialised(layer: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """The layer with its backward pass as `moejax.config.ModelConfig` says under `remat`."""
    return layer if remat == "none" else jax.checkpoint(layer, policy=_POLICIES[remat])
