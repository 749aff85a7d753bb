"""`ROUTERS`: the catalogue by name, and `make_router`, which turns a name or a function into a
`Router`."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.names import did_you_mean
from moejax.routing.expert_choice import expert_choice
from moejax.routing.token_choice import gshard_top2, loss_free, sign_update, switch, topk
from moejax.routing.types import RouterFn, Routing


class RouterSpec(NamedTuple):
    """A catalogue entry: the pure function, the state rule it may need, and what a reader asks
    first.

    Attributes:
      route: (RouterInput, *, hyper-parameters) -> Routing.
      update: (state, load_E, *, hyper-parameters) -> state, once per optimizer step; None = no
        state.
      init: num_experts -> the state of one layer at step 0.
      chooses: 'token' or 'expert': who picks whom.
      weight: the score, and whether it is raw or renormalised.
      balance: what keeps the load even.
      paper: where it is from.
    """

    route: Callable[..., Routing]
    chooses: str
    weight: str
    balance: str
    paper: str
    update: Callable[..., jax.Array] | None = None
    init: Callable[[int], Any] | None = None


ROUTERS: dict[str, RouterSpec] = {
    "switch": RouterSpec(
        switch, "token", "softmax, raw", "load_balance loss", "Fedus et al. 2021, 2101.03961"
    ),
    "gshard_top2": RouterSpec(
        gshard_top2,
        "token",
        "softmax, renormalised",
        "load_balance loss on first choices (load_balance_top1)",
        "Lepikhin et al. 2020, 2006.16668",
    ),
    "topk": RouterSpec(
        topk,
        "token",
        "softmax, raw or renormalised",
        "load_balance loss, router_z loss",
        "Muennighoff et al. 2024, 2409.02060; Jiang et al. 2024, 2401.04088",
    ),
    "expert_choice": RouterSpec(
        expert_choice, "expert", "softmax, raw", "exact by design", "Zhou et al. 2022, 2202.09368"
    ),
    "loss_free": RouterSpec(
        loss_free,
        "token",
        "sigmoid, raw or renormalised",
        "bias from the loads (router state)",
        "Wang et al. 2024, 2408.15664",
        update=sign_update,
        init=lambda num_experts: jnp.zeros(num_experts, jnp.float32),
    ),
}


class Router(NamedTuple):
    """A router with its hyper-parameters bound.

    Attributes:
      route: RouterInput -> Routing.
      init: num_experts -> state of one layer, or None.
      update: (state, load_E) -> state.
      spec: the catalogue entry, None for a user's own function.
    """

    route: RouterFn
    init: Callable[[int], Any]
    update: Callable[[Any, jax.Array], Any]
    spec: RouterSpec | None = None


def hyperparameters(router: str | RouterFn) -> dict[str, Any]:
    """The options of a router by name, or of a function, with their defaults, as a config shows
    them.

    Raises:
      ValueError: unknown router.
    """
    route, update = _functions(router)
    return {**_keywords(route), **(_keywords(update) if update else {})}


def make_router(router: str | RouterFn, options: Mapping[str, Any] | None = None) -> Router:
    """A `Router` from a name in ROUTERS, or from a function of one RouterInput.

    Args:
      router: 'switch', ..., or a function (RouterInput, *, hyper-parameters) -> Routing.
      options: hyper-parameters of the route and of its state update, by name.

    Raises:
      ValueError: unknown router or hyper-parameter, with the nearest names.
    """
    route, update = _functions(router)
    spec = None if callable(router) else ROUTERS[router]
    options, known = dict(options or {}), hyperparameters(router)
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"router {_name(router)} has no option {name!r}{hint}")

    def bind(function: Callable[..., Any]) -> Callable[..., Any]:
        own = {name: options[name] for name in _keywords(function) if name in options}
        return functools.partial(function, **own)

    if spec is None or update is None or spec.init is None:
        return Router(bind(route), lambda _: None, lambda state, _: state, spec)
    return Router(bind(route), spec.init, bind(update), spec)


def _functions(
    router: str | RouterFn,
) -> tuple[Callable[..., Routing], Callable[..., Any] | None]:
    """The route and, for a router with state, its update."""
    if callable(router):
        return router, None
    if router not in ROUTERS:
        raise ValueError(f"unknown router {router!r}{did_you_mean(router, ROUTERS)}")
    return ROUTERS[router].route, ROUTERS[router].update


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _name(router: str | RouterFn) -> str:
    return router if isinstance(router, str) else getattr(router, "__name__", repr(router))
