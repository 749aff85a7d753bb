"""Routing: pure functions of arrays, from a token's logits to its experts. No Flax, no model."""

from moejax.routing.balance import BALANCE_LOSSES, load_balance, router_z
from moejax.routing.decisions import Decisions, decisions
from moejax.routing.metrics import MoeStats, max_vio, moe_stats, normalised_entropy
from moejax.routing.registry import ROUTERS, Router, hyperparameters, make_router
from moejax.routing.spec import LayerSize, RouterSpec
from moejax.routing.types import Recorded, RouterFn, RouterInput, Routing, combine_TE, token_choice

__all__ = [
    "BALANCE_LOSSES",
    "ROUTERS",
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
    "router_z",
    "token_choice",
]
