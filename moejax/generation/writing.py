"""Text from a saved run: who can write, and the compiled program that does."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.causality import Dependence, dependence
from moejax.config import Config
from moejax.data.tokenizer import SEPARATOR
from moejax.dispatch import BATCH_AXES
from moejax.generation.decode import Prompts, generate, pad
from moejax.generation.sampling import Sampling, checked
from moejax.moe import MoeOptions
from moejax.sharding import batch_sharding
from moejax.training.program import lay_out
from moejax.training.saved import SavedRun
from moejax.training.state import make_graph


class Written(NamedTuple):
    """What was written.

    Attributes:
      token_ids: of each prompt what follows it, int32, without the separator that ended it.
      seconds: that it took to read the prompts and to write.
      compile_seconds: before that; almost none where the same sizes were written before.
    """

    token_ids: list[np.ndarray]
    seconds: float
    compile_seconds: float


def write(
    run: SavedRun,
    prompts: Sequence[np.ndarray],
    *,
    tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Written:
    """Continues each prompt, until a separator or so many tokens.

    Args:
      run: the run, at one of its checkpoints.
      prompts: ids of each, one at least.
      tokens: N of each.
      temperature, top_p: see `Sampling`.
      seed: of the first row; row i draws with seed + i.

    Raises:
      ValueError: sampling that makes no sense; a run that cannot write, see `writing_config`.
    """
    temperature, top_p = checked(temperature, top_p)
    mesh = run.program.mesh
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows = -(-len(prompts) // parts) * parts
    config = writing_config(run.config, len(prompts), rows)
    padded = pad(prompts, rows, max(1, config.model.query_block))
    how = Sampling(
        np.float32(temperature), np.float32(top_p), np.arange(seed, seed + rows, dtype=np.int32)
    )
    began = time.perf_counter()
    program = compiled(config, run.dataset.vocab_size, mesh, padded.token_BP.shape[1], tokens)
    ready = time.perf_counter()
    token_BN = jax.device_get(program(run.state.params, run.state.router_state, padded, how))
    seconds = time.perf_counter() - ready
    return Written([_text(ids) for ids in token_BN[: len(prompts)]], seconds, ready - began)


def _text(token_N: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(token_N == SEPARATOR)
    return token_N[: ends[0]] if len(ends) else token_N


def writing_config(config: Config, prompts: int, rows: int) -> Config:
    """A run's config as it writes: routing as evaluation does, nothing dropped.

    Args:
      config: as it was trained.
      prompts, rows: of a batch, without and with those that fill it up for the mesh.

    Raises:
      ValueError: routing that looks at later tokens; routing that compares rows, and there are too
        few, or some that only fill up.
    """
    moe = dataclasses.replace(
        config.moe.evaluation(),
        dispatch="dropless",
        capacity_factor=None,
        eval_capacity_factor=None,
        buffer_factor=None,
    )
    if moe.experts:
        found = looks(config)
        if (found.others or found.others_gradient) and prompts < rows:
            raise ValueError(
                f"router {config.router.label!r} with groups={moe.groups!r} compares the prompts "
                f"of a batch, and {prompts} are not divisible by data x fsdp x expert of the mesh; "
                f"give {rows}"
            )
    data = dataclasses.replace(config.data, batch=rows)
    train = dataclasses.replace(config.train, accumulation=1)
    try:
        return dataclasses.replace(config, moe=moe, data=data, train=train)
    except ValueError as error:
        raise ValueError(f"{error}; a step writes one token of each of {rows} prompts") from None


def looks(config: Config) -> Dependence:
    """At what else the routing of a token looks as the model writes.

    Raises:
      ValueError: at later tokens, as the attention of a model of masked tokens does, too.
    """
    moe, router = config.moe.evaluation(), config.router
    if not config.causal:
        raise ValueError(
            f"data.mask_rate={config.data.mask_rate}: the model fills gaps, it cannot write on; "
            "train it with data.mask_rate=0"
        )
    if moe.slots:
        raise ValueError(
            f"moe.slots={moe.slots} (Soft MoE) mixes each token with later ones of its sequence, "
            "which are not there yet: it cannot write"
        )
    options = MoeOptions(router.make(), groups=moe.groups)
    found = dependence(options, moe.experts, training=False)
    if not found.causal:
        raise ValueError(
            f"router {router.label!r} with groups={moe.groups!r} looks at later tokens of a "
            "sequence, which are not there yet: it cannot write (expert choice can where "
            "moe.eval_groups='position')"
        )
    return found


@functools.lru_cache(maxsize=8)
def compiled(
    config: Config, vocab_size: int, mesh: Mesh, length: int, tokens: int
) -> Callable[..., jax.Array]:
    """(params, router_state, Prompts, Sampling) -> int32 [B, N], compiled; B = config.data.batch.

    Args:
      config: see `writing_config`.
      vocab_size: V.
      mesh: on which the state lies.
      length, tokens: P and N.
    """
    graph = make_graph(config, vocab_size)
    state = lay_out(config, vocab_size, mesh).state

    def run(params: Any, router_state: Any, prompts: Prompts, how: Sampling) -> jax.Array:
        model = nnx.merge(graph, params)
        return generate(model, router_state, prompts, how, tokens=tokens, stop=SEPARATOR)

    cut, everywhere = batch_sharding(mesh), NamedSharding(mesh, P())
    rows = config.data.batch

    def array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    prompts: Any = [array((rows, length), dtype, cut) for dtype in (jnp.int32, jnp.bool_)]
    number = array((), jnp.float32, everywhere)
    how = Sampling(number, number, array((rows,), jnp.int32, cut))
    with jax.set_mesh(mesh):
        jitted = jax.jit(run, out_shardings=everywhere)
        return jitted.lower(state.params, state.router_state, Prompts(*prompts), how).compile()
