"""`TrainState`: everything a run is at one step, and all that a checkpoint holds. Born sharded."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import Config
from moejax.model import MoE, Transformer
from moejax.routing import LayerSize, Router
from moejax.sharding import param_shardings, state_shardings


class TrainState(NamedTuple):
    """One run at one step.

    Attributes:
      step: int32, optimizer steps done.
      position: int32, rows of the data stream consumed; with the seed, the whole state of the data.
      key: uint32 [2], the run's PRNG key; step s draws from fold_in(key, s).
      params: nested dict of float32 arrays.
      opt_state: optax's.
      router_state: what routers carry, with a leading axis over MoE layers; None for most.
    """

    step: jax.Array
    position: jax.Array
    key: jax.Array
    params: Any
    opt_state: Any
    router_state: Any


def make_graph(
    config: Config, vocab_size: int, change: Callable[[Router], Router] | None = None
) -> Any:
    """The static side of the model: `nnx.merge(graph, params)` is the model with these parameters,
    its layers' routers changed if so told."""
    model = nnx.eval_shape(lambda: Transformer(config, vocab_size, nnx.Rngs(params=0)))
    if change is not None:
        for layer in (block.feed_forward for unit in model.stacks for block in unit.blocks):
            if isinstance(layer, MoE):
                layer.options = layer.options._replace(router=change(layer.options.router))
    return nnx.split(model)[0]


def init_router_state(config: Config, count_V: jax.Array) -> Any:
    """Router states of all MoE layers at step 0, stacked; None where the router has none."""
    if not config.moe.experts or config.moe.slots:
        return None
    size = LayerSize(config.moe.experts, config.model.dim, count_V.shape[0], count_V)
    state = config.router.make().init(size)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (config.moe_layers, *a.shape)), state)


def init_state(
    seed: jax.Array,
    count_V: jax.Array | None = None,
    *,
    config: Config,
    vocab_size: int,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state at step 0: a pure function of the seed (int32 scalar) and, for routers that hash
    tokens, of how often each id stands in the training text (float32; None = all alike)."""
    count_V = jnp.ones(vocab_size) if count_V is None else count_V
    init_key, run_key = jax.random.split(jax.random.key(seed))
    model = Transformer(config, vocab_size, nnx.Rngs(params=init_key))
    params = nnx.to_pure_dict(nnx.state(model))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        position=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(run_key),
        params=params,
        opt_state=optimizer.init(params),
        router_state=init_router_state(config, count_V),
    )


def shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """A NamedSharding for each leaf of an (abstract) state."""
    everywhere: Any = NamedSharding(mesh, P())
    return TrainState(
        step=everywhere,
        position=everywhere,
        key=everywhere,
        params=param_shardings(state.params, mesh),
        opt_state=state_shardings(state.opt_state, state.params, mesh),
        router_state=jax.tree.map(lambda _: everywhere, state.router_state),
    )
