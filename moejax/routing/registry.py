"""`ROUTERS`: the catalogue by name, and `make_router`: a name, function or spec to a `Router`."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from moejax.names import did_you_mean
from moejax.routing import (
    assignment,
    deepseek,
    dense_gradient,
    expert_choice,
    hash,
    loss_free,
    noisy,
    quantile,
    remoe,
    replay,
    token_choice,
)
from moejax.routing.spec import LayerSize, RouterSpec
from moejax.routing.types import RouterFn

ROUTERS: dict[str, RouterSpec] = {
    **token_choice.ROUTERS,
    **loss_free.ROUTERS,
    **expert_choice.ROUTERS,
    **noisy.ROUTERS,
    **deepseek.ROUTERS,
    **hash.ROUTERS,
    **quantile.ROUTERS,
    **remoe.ROUTERS,
    **assignment.ROUTERS,
    **dense_gradient.ROUTERS,
    **replay.ROUTERS,
}


class Router(NamedTuple):
    """A router with its hyper-parameters bound. A router without state has the state None.

    Attributes:
      route: RouterInput -> Routing.
      init: LayerSize -> state of one layer, or None.
      update: (state, MoeStats, **rates) -> state, both with a leading layer axis; `update_rates`
        given here, as arrays, take the place of those that are bound.
      columns: E -> how many further projections of a token it looks at.
      spec: what is said of it, None for a user's own function without one.
      order: who goes first when an expert is full: see `token_choice`.
    """

    route: RouterFn
    init: Callable[[LayerSize], Any]
    update: Callable[..., Any]
    columns: Callable[[int], int]
    spec: RouterSpec | None = None
    order: str = "k_major"


AnyRouter = str | RouterFn | RouterSpec


def hyperparameters(router: AnyRouter) -> dict[str, Any]:
    """The options of a router by name, or of a function or spec, with their defaults, as a config
    shows them.

    Raises:
      ValueError: unknown router.
    """
    options: dict[str, Any] = {}
    for function in _functions(router).values():
        options |= _keywords(function)
    return options


def update_rates(router: AnyRouter) -> dict[str, float]:
    """Of a router by name, the options that are floats and that only its state's update takes, with
    their defaults. They may be traced: the catalogue's updates compute with them, and never branch
    on them. A user's own may, so it has none.

    Raises:
      ValueError: unknown router.
    """
    if not isinstance(router, str):
        return {}
    functions = _functions(router)
    own = _keywords(functions.pop("update")) if "update" in functions else {}
    others = {name for function in functions.values() for name in _keywords(function)}
    return {n: v for n, v in own.items() if isinstance(v, float) and n not in others}


def make_router(router: AnyRouter, options: Mapping[str, Any] | None = None) -> Router:
    """A `Router` from a name in ROUTERS, from a function of one RouterInput, or from a spec.

    Args:
      router: 'switch', ...; a function (RouterInput, *, hyper-parameters) -> Routing; or a
        `RouterSpec`, which may have a state and says who chooses.
      options: hyper-parameters of the route and of its state, by name.

    Raises:
      ValueError: unknown router or hyper-parameter, with the nearest names.
    """
    functions = _functions(router)
    options, known = dict(options or {}), hyperparameters(router)
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"router {router_name(router)} has no option {name!r}{hint}")

    def bound(part: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
        function = functions.get(part, otherwise)
        own = {name: options[name] for name in _keywords(function) if name in options}
        return functools.partial(function, **own)

    return Router(
        route=bound("route", lambda r: None),
        init=bound("init", lambda size: None),
        update=bound("update", lambda state, stats: state),
        columns=bound("columns", lambda experts: 0),
        spec=_spec(router),
        order=(known | options).get("order", "k_major"),
    )


def router_name(router: AnyRouter) -> str:
    """How a router is called where it must be named."""
    if isinstance(router, str):
        return router
    function = router.route if isinstance(router, RouterSpec) else router
    return getattr(function, "__name__", repr(function))


def _spec(router: AnyRouter) -> RouterSpec | None:
    if isinstance(router, RouterSpec):
        return router
    if not isinstance(router, str):
        return None
    if router not in ROUTERS:
        raise ValueError(f"unknown router {router!r}{did_you_mean(router, ROUTERS)}")
    return ROUTERS[router]


def _functions(router: AnyRouter) -> dict[str, Callable[..., Any]]:
    """The functions of a router that take hyper-parameters."""
    spec = _spec(router)
    if spec is None:
        return {"route": cast(RouterFn, router)}
    parts = {part: getattr(spec, part) for part in ("route", "init", "update", "columns")}
    return {part: function for part, function in parts.items() if function is not None}


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
