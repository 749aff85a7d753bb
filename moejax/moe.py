"""The spine: what a Mixture-of-Experts layer does, one line a stage. Pure functions of arrays."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from moejax.dispatch import (
    DISPATCH,
    Experts,
    Plan,
    Shards,
    Shared,
    expert_specs,
    mesh_shards,
    route_and_plan,
    shared_beside,
    shared_specs,
)
from moejax.dispatch.local import per_token, tokens_choose
from moejax.dispatch.plan import fitted
from moejax.routing import (
    Decisions,
    MoeStats,
    Recorded,
    Router,
    RouterInput,
    Routing,
    decisions,
    moe_stats,
    token_keys,
)

Layer = Callable[..., tuple[jax.Array, MoeStats]]


class MoeParams(NamedTuple):
    """Weights of one MoE layer: the router's (float32) and the experts'.

    `w_extra_DX` is for routers that look at more than one logit an expert; None for most. `shared`:
    the experts that see every token, ungated; None where there are none.
    """

    w_router_DE: jax.Array
    experts: Experts
    w_extra_DX: jax.Array | None = None
    shared: Shared | None = None


class MoeOptions(NamedTuple):
    """The static side of an MoE layer. See `moejax.config.MoeConfig` for the meaning of each."""

    router: Router
    dispatch: str = "dropless"
    activation: str = "swiglu"
    capacity_factor: float | None = None
    groups: str = "batch"
    jitter: float = 0.0
    buffer_factor: float | None = None


def moe(
    p: MoeParams,
    x_BSD: jax.Array,
    *,
    options: MoeOptions,
    valid_BS: jax.Array,
    token_BS: jax.Array | None = None,
    key: jax.Array | None = None,
    state: Any = None,
    recorded: Recorded | None = None,
    record: bool = False,
) -> tuple[jax.Array, MoeStats]:
    """One MoE layer.

    Args:
      p: weights; the experts' in the compute dtype, the router's in float32.
      x_BSD: tokens in the compute dtype.
      options: router, dispatch, capacity.
      valid_BS: bool, True = a real token.
      token_BS: int32 vocabulary ids, for routers that want them.
      key: in training a PRNG key, or one for each sequence [B]; each token gets its own of it. None
        in evaluation: no noise, no jitter.
      state: the router's state for this layer. It is read, never written.
      recorded: another run's routing of these tokens, arrays [B, S, R], for the router `replay`.
      record: put this routing into the statistics: `MoeStats.decisions`, arrays [B, S, ...].

    Returns:
      y_BSD in x's dtype, zeros where no expert worked on a token (besides the shared ones), and the
      layer's statistics.
    """
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    r = router_input(p, x_TD, valid_BS, token_BS, key, state, options.jitter)
    if recorded is not None:
        recorded = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), recorded)
        r = r._replace(recorded=recorded)
    shards = mesh_shards()
    if x_BSD.shape[0] % shards.count:
        raise ValueError(
            f"{x_BSD.shape[0]} sequences are not divisible by data x fsdp x expert = {shards.count}"
        )
    sequences = x_BSD.shape[0] // shards.count
    layer: Layer = functools.partial(
        _layer, sequences=sequences, options=options, record=record, shards=shards
    )
    if shards.axes:
        layer = _on_mesh(layer, p, r, shards)
    y_TD, stats = layer(p.experts, p.shared, x_TD, r)
    return y_TD.reshape(x_BSD.shape), stats


def _on_mesh(layer: Layer, p: MoeParams, r: RouterInput, shards: Shards) -> Layer:
    """The layer on each device's tokens."""
    cut, whole = P(shards.axes), P()
    r_cut: Any = jax.tree.map(lambda _: cut, r._replace(state=None))
    stats_cut: Any = dict.fromkeys(MoeStats._fields, whole) | {"decisions": cut}
    return jax.shard_map(
        layer,
        in_specs=(
            *(expert_specs(p.experts), shared_specs(p.shared)),
            *(cut, r_cut._replace(state=whole)),
        ),
        out_specs=(cut, MoeStats(**stats_cut)),
        check_vma=False,
    )


def _layer(
    p: Experts,
    shared: Shared | None,
    x_TD: jax.Array,
    r: RouterInput,
    *,
    sequences: int,
    options: MoeOptions,
    record: bool,
    shards: Shards,
) -> tuple[jax.Array, MoeStats]:
    """The layer on this device's sequences: what an MoE layer does, one line a stage."""
    routing, plan = route_and_plan(
        *(options.router, r, sequences),
        groups=options.groups,
        capacity_factor=options.capacity_factor,
        shards=shards,
    )
    spread = bool(shards.axes)
    way = spread_dispatch(options.dispatch, options.groups) if spread else options.dispatch
    if spread and way == "dropless":
        plan = fitted(plan, options.buffer_factor)
    beside = shared_beside(shared, x_TD, options.activation, spread)
    y_TD, output_ED = DISPATCH[way](p, x_TD, plan, options.activation, spread, beside)
    if spread:  # each device of the axis `tensor` has worked with a part of the hidden width
        y_TD, output_ED = jax.lax.psum((y_TD, output_ED), "tensor")
    if routing.rest_TD is not None:
        y_TD = (y_TD + routing.rest_TD).astype(x_TD.dtype)
    stats = shards.total(moe_stats(r, routing, plan, output_ED, sequences))
    if record:
        width = per_token(options.router, routing) if tokens_choose(options.router) else 0
        stats = stats._replace(decisions=_decisions(routing, plan, sequences, width))
    return y_TD, stats


def spread_dispatch(dispatch: str, groups: str) -> str:
    """How tokens move on a mesh. Where a group spans devices, its whole capacity may fall to one of
    them, and buffers would hold that many rows everywhere: rows travel sorted instead."""
    return "dropless" if dispatch == "gather" and groups != "sequence" else dispatch


def _decisions(routing: Routing, plan: Plan, sequences: int, width: int) -> Decisions:
    """The routing by token, arrays [B, S, ...]."""
    kept_N = plan.expert_N < routing.scores_TE.shape[-1]
    by_token = decisions(routing, kept_N, width)
    return jax.tree.map(lambda a: a.reshape(sequences, -1, *a.shape[1:]), by_token)


def router_input(
    p: MoeParams,
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
    key_T = None if key is None else _token_keys(key, valid_BS.shape)
    if jitter and key_T is not None:
        x_TD = x_TD * _jitter(key_T, x_TD.shape[-1], jitter)
    logits_TE = checkpoint_name(_project(x_TD, p.w_router_DE), "routing")
    r = RouterInput(logits_TE, valid_BS.reshape(-1), key_T, state)
    if token_BS is not None:
        next_BS = jnp.concatenate([token_BS[:, 1:], token_BS[:, -1:]], axis=1)
        r = r._replace(token_T=token_BS.reshape(-1), next_T=next_BS.reshape(-1))
    if p.w_extra_DX is not None:
        r = r._replace(extra_TX=_project(x_TD, p.w_extra_DX))
    return r


def _token_keys(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Keys [T] of sequences' keys [B], or of one: a token's does not depend on the other rows."""
    rows, length = shape
    return jax.vmap(lambda k: jax.random.split(k, length))(token_keys(key, rows)).reshape(-1)


def _jitter(key_T: jax.Array, dim: int, jitter: float) -> jax.Array:
    """U[1 - jitter, 1 + jitter], float32 [T, D], from other keys than the router's."""

    def draw(key: jax.Array) -> jax.Array:
        other = jax.random.fold_in(key, 2**31 - 1)  # no router gets so far
        return jax.random.uniform(other, (dim,), minval=1 - jitter, maxval=1 + jitter)

    return jax.vmap(draw)(key_T)


def _project(x_TD: jax.Array, w_DX: jax.Array) -> jax.Array:
    # Full float32 products: TPUs and GPUs would otherwise multiply in bfloat16 or TF32 and flip
    # choices.
    return jnp.dot(x_TD, w_DX, precision=jax.lax.Precision.HIGHEST)
