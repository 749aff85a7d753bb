"""A run's compiled functions. Runs that differ only in seed, first weights or `coefficients` share
one program, and one compilation."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered

from moejax.analysis.ablation import ablated
from moejax.config import Config
from moejax.data import Batch
from moejax.model.size import Size, model_size
from moejax.routing import Recorded, Router
from moejax.sharding import batch_sharding, check_batch, local_rows, make_mesh
from moejax.tracing.schema import index_dtype
from moejax.training.coefficients import (
    Coefficients,
    abstract_coefficients,
    coefficients,
    compiled_in,
)
from moejax.training.optimizer import make_optimizer
from moejax.training.recording import ReplayBatch
from moejax.training.state import TrainState, init_state, make_graph, shardings
from moejax.training.step import EvalSums, eval_step, train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """What a loop calls.

    Attributes:
      init: (seed, count_V) -> the state at step 0, born sharded; see `init_state`.
      train_step: (state, batch) -> (state, metrics); the old state's buffers are reused. The
        compiled step, at the run's `coefficients`.
      eval_step: (params, router_state, batch, bytes_V) -> EvalSums, as evaluation routes.
      eval_as_trained: the same, routed in the groups of training; None where they are the same.
      eval_without: as eval_step, the routers being `ablated`: router_state is a `Without` of all
        MoE layers.
      abstract_state: shapes, dtypes and shardings of the state.
      batch: how many rows a global batch has.
      rows: those of them that this process brings; see `local_rows`.
      size: of the model.
      compile_seconds: that it took to compile the training step.
    """

    init: Callable[..., TrainState]
    train_step: Callable[..., tuple[TrainState, dict[str, Any]]]
    eval_step: Callable[..., EvalSums]
    eval_as_trained: Callable[..., EvalSums] | None
    eval_without: Callable[..., EvalSums]
    abstract_state: TrainState
    mesh: Mesh
    batch: int
    rows: np.ndarray
    size: Size
    compile_seconds: float

    def put(self, batch: Batch) -> Batch:
        """The global batch on the devices, of which this process brings its `rows`."""
        sharding = batch_sharding(self.mesh)

        def place(a: np.ndarray) -> jax.Array:
            def shard(index: Any) -> np.ndarray:  # of the global array
                start, stop, _ = index[0].indices(self.batch)
                first = int(self.rows.searchsorted(start))
                return a[first : first + stop - start]

            return jax.make_array_from_callback((self.batch, *a.shape[1:]), sharding, shard)

        return jax.tree.map(place, batch)


def build_program(
    config: Config,
    vocab_size: int,
    num_domains: int,
    devices: tuple[jax.Device, ...] | None = None,
    width: int = 0,
    *,
    training: bool = True,
) -> Program:
    """The compiled program of a config, on the given devices (default: all).

    `width`: R of the recorded routing that batches bring; 0 = they bring none. `training` False: to
    evaluate only. The training step, most of the compile time, is left out.

    Raises:
      ValueError: the mesh does not fit the devices, the batch or a weight.
    """
    where, common = devices or tuple(jax.devices()), compiled_in(config)
    program = _build(common, vocab_size, num_domains, where, width, training)
    scaled = dataclasses.replace(common, model=config.model, moe=config.moe)
    return dataclasses.replace(
        program,
        init=_initialiser(scaled, vocab_size, where),
        train_step=functools.partial(program.train_step, numbers=coefficients(config)),
    )


class Laid(NamedTuple):
    """A config laid over a mesh; nothing is computed or allocated yet.

    Attributes:
      init: see `Program`.
      state: shapes, dtypes and shardings of the state.
      shardings: of the state.
    """

    mesh: Any
    init: Callable[..., TrainState]
    state: TrainState
    shardings: TrainState


def lay_out(config: Config, vocab_size: int, mesh: Any) -> Laid:
    """A config's state on a mesh, which may be abstract, or of devices that are described only.

    Raises:
      ValueError: the mesh does not fit the batch or a weight.
    """
    check_batch(config.data.batch // config.train.accumulation, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    init = functools.partial(init_state, config=config, vocab_size=vocab_size, optimizer=optimizer)
    abstract = jax.eval_shape(init, 0)
    where = shardings(abstract, mesh)
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, where
    )
    return Laid(mesh, init, state, where)


def lower_train_step(config: Config, vocab_size: int, laid: Laid, width: int = 0) -> Lowered:
    """The training step, traced for the mesh and ready to compile. `width`: see `build_program`.

    On an abstract mesh it is lowered for TPUs, and there is nothing to compile it for.
    """
    graph = make_graph(config, vocab_size)

    def step(
        state: TrainState, batch: Batch, numbers: Coefficients
    ) -> tuple[TrainState, dict[str, Any]]:
        optimizer = make_optimizer(config.optimizer, config.train.steps, numbers.learning_rate)
        given = {"graph": graph, "config": config, "optimizer": optimizer}
        return train_step(state, batch, **given, numbers=numbers)

    batch = _abstract_batch(config, batch_sharding(laid.mesh), width)
    everywhere = NamedSharding(laid.mesh, P())  # read on the host: every process must hold it
    numbers = abstract_coefficients(config, everywhere)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(laid.shardings, everywhere))
    if isinstance(laid.mesh, AbstractMesh):
        with jax.sharding.use_abstract_mesh(laid.mesh):
            return jitted.trace(laid.state, batch, numbers=numbers).lower(
                lowering_platforms=("tpu",)
            )
    with jax.set_mesh(laid.mesh):
        return jitted.lower(laid.state, batch, numbers=numbers)


@functools.lru_cache(maxsize=32)
def _initialiser(
    config: Config, vocab_size: int, devices: tuple[jax.Device, ...]
) -> Callable[..., TrainState]:
    laid = lay_out(config, vocab_size, make_mesh(config.mesh, list(devices)))
    return jax.jit(laid.init, out_shardings=laid.shardings)


@functools.lru_cache(maxsize=32)  # of a suite, whose arms take turns, all
def _build(
    config: Config,
    vocab_size: int,
    num_domains: int,
    devices: tuple[jax.Device, ...],
    width: int,
    training: bool,
) -> Program:
    mesh = make_mesh(config.mesh, list(devices))
    laid = lay_out(config, vocab_size, mesh)
    start = time.perf_counter()
    compiled: Callable[..., Any] = _left_out
    if training:
        compiled = lower_train_step(config, vocab_size, laid, width).compile()
    evaluation, as_trained = _evaluations(config)
    everywhere = NamedSharding(mesh, P())

    def evaluator(
        moe_config: Config, change: Callable[[Router], Router] | None = None
    ) -> Callable[..., EvalSums]:
        @functools.cache  # made when it is first called: few programs need all of theirs
        def jitted() -> Callable[..., EvalSums]:
            eval_graph = make_graph(moe_config, vocab_size, change)
            step = functools.partial(eval_step, graph=eval_graph, domains=num_domains)
            return jax.jit(step, out_shardings=everywhere)

        def evaluate(*arguments: Any) -> EvalSums:
            step = jitted()
            with jax.set_mesh(mesh):
                return step(*arguments)

        return evaluate

    return Program(
        init=_initialiser(config, vocab_size, devices),
        train_step=compiled,
        eval_step=evaluator(evaluation),
        eval_as_trained=evaluator(as_trained) if as_trained else None,
        eval_without=evaluator(evaluation, ablated),
        abstract_state=laid.state,
        mesh=mesh,
        batch=config.data.batch,
        rows=local_rows(config.data.batch, mesh),
        size=model_size(config, vocab_size),
        compile_seconds=time.perf_counter() - start,
    )


def _left_out(*_: Any, **__: Any) -> Any:
    raise RuntimeError("this program was built with training=False")


def _evaluations(config: Config) -> tuple[Config, Config | None]:
    """The config as evaluation routes, and, where it groups tokens otherwise, as training did."""
    evaluation = dataclasses.replace(config, moe=config.moe.evaluation())
    if evaluation.moe.groups == config.moe.groups:
        return evaluation, None
    as_trained = dataclasses.replace(evaluation.moe, groups=config.moe.groups)
    return evaluation, dataclasses.replace(config, moe=as_trained)


def _abstract_batch(config: Config, sharding: NamedSharding, width: int) -> Batch | ReplayBatch:
    rows, sequence = config.data.batch, config.data.sequence

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tokens = array((rows, sequence))
    batch = Batch(tokens, tokens, tokens, tokens, array((rows, sequence), np.bool_), array((rows,)))
    if width:
        shape = (rows, config.moe_layers, sequence, width)
        expert = array(shape, index_dtype(config.moe.experts))
        return ReplayBatch(*batch, Recorded(expert, array(shape, np.float32)))
    return batch
