"""Routing: pure functions of arrays, from a token's logits to its experts. No Flax, no model."""

from moejax.routing.balance import BALANCE_LOSSES, load_balance, router_z
from moejax.routing.decisions import Decisions, decisions
from moejax.routing.metrics import MoeStats, max_vio, moe_stats, normalised_entropy
from moejax.routing.registry import (
    ROUTERS,
    AnyRouter,
    Router,
    hyperparameters,
    make_router,
    router_name,
    update_rates,
)
from moejax.routing.spec import LayerSize, RouterSpec
from moejax.routing.types import (
    Recorded,
    RouterFn,
    RouterInput,
    Routing,
    combine_TE,
    token_choice,
    token_keys,
    token_noise,
)

__all__ = [
    "BALANCE_LOSSES",
    "ROUTERS",
    "AnyRouter",
    "Decisions",
    "LayerSize",
    "MoeStats",
    "Recorded",
    "Router",
    "RouterFn",
    "RouterInput",
    "RouterSpec",
    "Routing",
    "combine_TE",
    "decisions",
    "hyperparameters",
    "load_balance",
    "make_router",
    "max_vio",
    "moe_stats",
    "normalised_entropy",
    "router_name",
    "router_z",
    "token_choice",
    "token_keys",
    "token_noise",
    "update_rates",
]
