"""The spine: what a Mixture-of-Experts layer does, one line a stage. Pure functions of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.dispatch import DISPATCH, Experts, make_plan, route
from moejax.routing import MoeStats, Router, RouterInput, moe_stats


class MoeParams(NamedTuple):
    """Weights of one MoE layer: the router's w_DE (float32) and the experts'."""

    w_router_DE: jax.Array
    experts: Experts


class MoeOptions(NamedTuple):
    """The static side of an MoE layer. See `moejax.config.MoeConfig` for the meaning of each."""

    router: Router
    dispatch: str = "dropless"
    activation: str = "swiglu"
    capacity_factor: float | None = None
    groups: str = "batch"
    jitter: float = 0.0


def moe(
    p: MoeParams,
    x_BSD: jax.Array,
    *,
    options: MoeOptions,
    valid_BS: jax.Array,
    token_BS: jax.Array | None = None,
    key: jax.Array | None = None,
    state: Any = None,
) -> tuple[jax.Array, MoeStats]:
    """One MoE layer.

    Args:
      p: weights; the experts' in the compute dtype, the router's in float32.
      x_BSD: tokens in the compute dtype.
      options: router, dispatch, capacity.
      valid_BS: bool, True = a real token.
      token_BS: int32 vocabulary ids, for routers that want them.
      key: PRNG key in training; None in evaluation: no noise, no jitter.
      state: the router's state for this layer. It is read, never written.

    Returns:
      y_BSD in x's dtype, zeros where no expert worked on a token, and the layer's statistics.
    """
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    r = router_input(p.w_router_DE, x_TD, valid_BS, token_BS, key, state, options.jitter)
    routing = route(options.router.route, r, x_BSD.shape[0], options.groups)
    plan = make_plan(routing, options.capacity_factor, num_groups(x_BSD.shape, options.groups))
    y_TD = DISPATCH[options.dispatch](p.experts, x_TD, plan, options.activation)
    return y_TD.reshape(x_BSD.shape), moe_stats(r, routing, plan)


def router_input(
    w_router_DE: jax.Array,
    x_TD: jax.Array,
    valid_BS: jax.Array,
    token_BS: jax.Array | None,
    key: jax.Array | None,
    state: Any,
    jitter: float,
) -> RouterInput:
    """The router's logits in float32, inputs cast too, and what else a router may look at.

    Jitter (Switch, section 2.2) multiplies the router's input, never what the experts see, by
    U[1 - jitter, 1 + jitter], elementwise.
    """
    x_TD = x_TD.astype(jnp.float32)
    if jitter and key is not None:
        key, noise = jax.random.split(key)
        x_TD = x_TD * jax.random.uniform(noise, x_TD.shape, minval=1 - jitter, maxval=1 + jitter)
    # Full float32 products: TPUs and GPUs would otherwise multiply in bfloat16 or TF32 and flip
    # choices.
    logits_TE = jnp.dot(x_TD, w_router_DE, precision=jax.lax.Precision.HIGHEST)
    return RouterInput(
        logits_TE,
        valid_BS.reshape(-1),
        key,
        state,
        None if token_BS is None else token_BS.reshape(-1),
    )


def num_groups(shape: tuple[int, ...], groups: str) -> int:
    """How many groups a [B, S, ...] batch is cut into."""
    return {"batch": 1, "sequence": shape[0], "position": shape[1]}[groups]
