"""`ROUTERS`: the catalogue by name, and `make_router`, which turns a name or a function into a `Router`."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.routing.expert_choice import expert_choice
from moejax.routing.token_choice import gshard_top2, loss_free, sign_update, switch, topk
from moejax.routing.types import RouterFn, Routing


class RouterSpec(NamedTuple):
    """A catalogue entry: the pure function, the state rule it may need, and what a reader asks first.

    Attributes:
      route: (RouterInput, *, hyper-parameters) -> Routing.
      update: (state, load_E, *, hyper-parameters) -> state, once per optimizer step; None = no state.
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


def hyperparameters(name: str) -> dict[str, Any]:
    """The hyper-parameters of a built-in router with their defaults, as a config shows them.

    Raises:
      ValueError: unknown router.
    """
    spec = _spec(name)
    return {**_keywords(spec.route), **(_keywords(spec.update) if spec.update else {})}


def make_router(router: str | RouterFn, options: Mapping[str, Any] | None = None) -> Router:
    """A `Router` from a name in ROUTERS, or from a function of one RouterInput.

    Args:
      router: 'switch', ..., or a function (RouterInput, *, hyper-parameters) -> Routing.
      options: hyper-parameters of the route and of its state update, by name.

    Raises:
      ValueError: unknown router or hyper-parameter, with the nearest names.
    """
    spec = router if callable(router) else _spec(router)
    route = spec.route if isinstance(spec, RouterSpec) else spec
    update = spec.update if isinstance(spec, RouterSpec) else None
    options = dict(options or {})
    known = {**_keywords(route), **(_keywords(update) if update else {})}
    for name in options:
        if name not in known:
            raise ValueError(f"router {_name(router)} has no option {_did_you_mean(name, known)}")
    bound = functools.partial(route, **{k: options[k] for k in _keywords(route) if k in options})
    if update is None:
        return Router(
            bound,
            lambda _: None,
            lambda state, _: state,
            spec if isinstance(spec, RouterSpec) else None,
        )
    step = functools.partial(update, **{k: options[k] for k in _keywords(update) if k in options})
    assert isinstance(spec, RouterSpec) and spec.init is not None
    return Router(bound, spec.init, step, spec)


def _spec(name: str) -> RouterSpec:
    if name not in ROUTERS:
        raise ValueError(f"unknown router {_did_you_mean(name, ROUTERS)}")
    return ROUTERS[name]


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _name(router: str | RouterFn) -> str:
    return router if isinstance(router, str) else getattr(router, "__name__", repr(router))


def _did_you_mean(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{name!r}; {hint}known: {', '.join(sorted(known))}"
