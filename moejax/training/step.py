"""The pure functions of training: loss, one optimizer step, one evaluation batch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from moejax.config import Config
from moejax.data import UNSCORED, Batch
from moejax.routing import Decisions, MoeStats
from moejax.routing.balance import balance_losses
from moejax.routing.metrics import figures
from moejax.tracing.schema import index_dtype
from moejax.training.coefficients import Coefficients, coefficients
from moejax.training.cross_entropy import cross_entropy
from moejax.training.state import TrainState

TRACED_TOKENS = 2048  # of an evaluation


class Sums(NamedTuple):
    """What a (micro)batch adds up to: nats of cross entropy, targets, routing statistics."""

    nll: jax.Array
    targets: jax.Array
    stats: MoeStats | None


def forward(
    params: Any,
    router_state: Any,
    batch: Batch,
    key: jax.Array | None,
    graph: Any,
    record: bool = False,
) -> tuple[jax.Array, MoeStats | None]:
    """Cross entropy of each target in nats, nll_BS (0 where not `scored`), and the routing
    statistics. A `ReplayBatch` brings the routing that the router `replay` follows."""
    nll_BS, stats = nnx.merge(graph, params)(
        batch.tokens_BS,
        segment_BS=batch.segment_BS,
        position_BS=batch.position_BS,
        valid_BS=batch.valid_BS,
        key=key,
        router_state=router_state,
        recorded=jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), getattr(batch, "recorded", None)),
        record=record,
        # UNSCORED, -1, reads the last id's logit: a finite number, which is left out below.
        head=lambda x_BSD, w_DV: cross_entropy(x_BSD, w_DV, jnp.asarray(batch.targets_BS)),
    )
    return jnp.where(scored(batch), nll_BS, 0.0), stats


def scored(batch: Batch) -> jax.Array:
    """bool [B, S]: which real tokens have a target. All; if some are masked, those."""
    return jnp.asarray(batch.valid_BS & (batch.targets_BS != UNSCORED))


def loss_fn(
    params: Any,
    router_state: Any,
    batch: Batch,
    key: jax.Array,
    graph: Any,
    config: Config,
    weights: Mapping[str, ArrayLike] | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Cross entropy plus weighted balance losses, over the whole batch however it is cut. `weights`
    of the balance losses that have one: None = the config's.

    Microbatches are scanned *inside* the differentiated function, each rematerialised, and their
    sums added before any loss is formed. So a balance loss sees the loads of the global batch, and
    accumulation changes memory, not the result. With model.remat each layer of a recomputed
    microbatch is computed a third time: keeping its input instead, for all microbatches at once, is
    the memory that accumulation saves.
    """
    parts = config.train.accumulation

    def microbatch(_: None, xs: tuple[Batch, jax.Array]) -> tuple[None, tuple[Sums, Any]]:
        rows, key_B = xs
        record = config.train.trace_every > 0
        nll_BS, stats = forward(params, router_state, rows, key_B, graph, record)
        decisions = None
        if stats is not None:
            decisions, stats = stats.decisions, stats._replace(decisions=None)
        if decisions is not None:
            decisions = decisions._replace(scores_TE=None)
        return None, (Sums(nll_BS.sum(), scored(rows).sum(dtype=jnp.int32), stats), decisions)

    # A key for each row: its noise is the same in any microbatch.
    given = batch, jax.random.split(key, batch.tokens_BS.shape[0])
    given = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), given)
    body = jax.checkpoint(microbatch) if parts > 1 else microbatch
    _, (sums, decisions) = jax.lax.scan(body, None, given)
    sums = jax.tree.map(lambda a: a.sum(0), sums)

    cross_entropy = sums.nll / jnp.maximum(sums.targets, 1)
    balance = {} if sums.stats is None else balance_losses(sums.stats, dict(config.balance))
    weights = dict(config.balance) if weights is None else weights
    loss = cross_entropy + sum(weights[name] * value for name, value in balance.items())
    routing = {} if sums.stats is None else figures(sums.stats)
    aux = {"loss": cross_entropy, "balance": balance, "stats": sums.stats, **routing}
    if decisions is not None:
        decisions = jax.tree.map(_by_row, decisions)
        expert_LBSR = decisions.expert_TR.astype(index_dtype(config.moe.experts))
        rows = Batch(*(getattr(batch, name) for name in Batch._fields))
        aux["traced"] = rows, decisions._replace(expert_TR=expert_LBSR)
    return loss, aux


def _by_row(a_PLBS: jax.Array) -> jax.Array:
    """Of microbatches P, [P, L, b, S, ...], to the rows of the batch, [L, B, S, ...]."""
    a_LPBS = jnp.swapaxes(a_PLBS, 0, 1)
    return a_LPBS.reshape(a_LPBS.shape[0], -1, *a_LPBS.shape[3:])


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graph: Any,
    config: Config,
    optimizer: optax.GradientTransformation,
    numbers: Coefficients | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step: gradients, update, and the next router state from this batch's loads.
    `numbers`: the balance losses' weights and the router's rates; None = the config's.

    Returns:
      The next state, and metrics: loss (cross entropy, nats per target), balance (unweighted
        losses), grad_norm, the routing `figures`, and with train.trace_every what a trace is made
        of: traced, the batch and its `Decisions` [L, B, S, ...].
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    numbers = coefficients(config) if numbers is None else numbers
    gradient = jax.grad(loss_fn, has_aux=True)
    grads, aux = gradient(
        state.params, state.router_state, batch, key, graph, config, numbers.balance
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    stats = aux.pop("stats")
    router_state = state.router_state
    if router_state is not None:
        router_state = config.router.make().update(router_state, stats, **numbers.router)
    next_state = TrainState(
        step=state.step + 1,
        position=state.position + batch.tokens_BS.shape[0],
        key=state.key,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        router_state=router_state,
    )
    return next_state, {**aux, "grad_norm": optax.tree.norm(grads)}


class RowLoads(NamedTuple):
    """Each row's domain, and how often it went to each expert of each layer, before dropping."""

    domain_B: Any
    load_BLE: Any


class EvalSums(NamedTuple):
    """Sums over evaluation batches, by domain: nats, bytes of the targets; real tokens, targets;
    and routing statistics. Not summed are `rows`, and `traced`: the first rows, TRACED_TOKENS at
    most, and their decisions [L, B, S, ...]. Both are None where nothing is routed."""

    nll_domain: jax.Array
    bytes_domain: jax.Array
    tokens: jax.Array
    targets: jax.Array
    stats: MoeStats | None
    rows: RowLoads | None = None
    traced: tuple[Batch, Decisions] | None = None


def eval_step(
    params: Any, router_state: Any, batch: Batch, bytes_V: jax.Array, *, graph: Any, domains: int
) -> EvalSums:
    """One evaluation batch, without noise. Rows with domain -1 are padding."""
    nll_BS, stats = forward(params, router_state, batch, None, graph, record=True)
    loads, traced = None, None
    if stats is not None:
        if stats.decisions is not None:
            load_BLE = _row_loads(stats.decisions.expert_TR, stats.load_E.shape[-1])
            loads = RowLoads(batch.domain_B, load_BLE)
            few = max(1, TRACED_TOKENS // batch.tokens_BS.shape[1])
            decisions = stats.decisions._replace(scores_TE=None)
            traced = (
                jax.tree.map(lambda a: a[:few], batch),
                jax.tree.map(lambda a: a[:, :few], decisions),
            )
        stats = stats._replace(decisions=None)
    bytes_BS = jnp.where(scored(batch), bytes_V[batch.targets_BS], 0.0)

    def by_domain(a_BS: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(batch.domain_B, domains, dtype=jnp.float32)
        return a_BS.sum(1) @ one_hot

    return EvalSums(
        by_domain(nll_BS),
        by_domain(bytes_BS),
        batch.valid_BS.sum(dtype=jnp.int32),
        scored(batch).sum(dtype=jnp.int32),
        stats,
        loads,
        traced,
    )


def _row_loads(expert_LBSR: jax.Array, num_experts: int) -> jax.Array:
    """How often each row went to each expert, int32 [B, L, E]."""
    num_layers, rows = expert_LBSR.shape[:2]
    at_LBN = expert_LBSR.reshape(num_layers, rows, -1)
    layer_L11, row_1B1 = jnp.arange(num_layers)[:, None, None], jnp.arange(rows)[None, :, None]
    zeros_BLE = jnp.zeros((rows, num_layers, num_experts), jnp.int32)
    return zeros_BLE.at[row_1B1, layer_L11, at_LBN].add(1, mode="drop")
