"""Sparse upcycling: a dense run's weights as the start of a run with experts.

Komatsuzaki et al. 2022, 2212.05055: every expert begins as a copy of the dense feed-forward
network, all else is copied, the router is new. Where the router's weights sum to 1, nothing drops
and every token is reached, the model computes what the dense one did; with raw weights each
layer's output is scaled by the sum of the chosen probabilities.

Finer experts, of width F / m, are the m shards of the dense network, each as often as the others;
their output is multiplied by m, because a shard then gets 1 / m of its token's weight. The m
shards of one copy share their router's column, so they are chosen together and k a multiple of m
meets each shard equally often (He et al. 2024, 2410.07524). With s shared experts of that width,
these are the first s shards, and the routed ones the other m - s.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from moejax.config import Config
from moejax.model.transformer import layer_stacks
from moejax.training.checkpoint import Checkpoints
from moejax.training.optimizer import make_optimizer
from moejax.training.saved import read_config
from moejax.training.state import TrainState, init_state, shardings

_SAME = ("layers", "dim", "heads", "key_value_heads", "width", "ffn", "activation", "rope_theta")


def check_upcycle(old: Config, new: Config) -> None:
    """Whether a dense run's weights fit a config with experts.

    Raises:
      ValueError: other sizes, no dense layer where experts are wanted, a width that is no share of
        the dense one, experts that do not divide into its shards, or an optimizer whose state
        cannot be carried.
    """
    for name in _SAME:
        was, wanted = getattr(old.model, name), getattr(new.model, name)
        if was != wanted:
            raise ValueError(f"train.upcycle: the dense model has {name}={was}, this one {wanted}")
    if old.data.tokenizer != new.data.tokenizer:
        raise ValueError(
            f"train.upcycle: the dense model reads data.tokenizer={old.data.tokenizer}, this one "
            f"{new.data.tokenizer}"
        )
    if old.data.mask_rate != new.data.mask_rate:
        raise ValueError(
            f"train.upcycle: the dense model was trained with data.mask_rate={old.data.mask_rate}, "
            f"this one with {new.data.mask_rate}"
        )
    if not new.moe.experts:
        raise ValueError("train.upcycle makes experts, this config has moe.experts=0")
    was_moe = [place[3] == "moe" for place in _places(old)]
    if any(was_moe):
        raise ValueError(
            f"train.upcycle: layer {was_moe.index(True)} of the run that it names has no dense "
            f"feed-forward network but {old.moe.experts} experts; name a run of moe.experts=0"
        )
    if new.train.upcycle_optimizer and {old.optimizer.name, new.optimizer.name} != {"adamw"}:
        raise ValueError(
            "train.upcycle_optimizer carries the state of adamw only: the dense run has "
            f"optimizer.name={old.optimizer.name}, this one {new.optimizer.name}"
        )
    dense, width, shared = new.model.ffn, new.moe.ffn or new.model.ffn, new.moe.shared
    if dense % width:
        raise ValueError(
            f"train.upcycle: moe.ffn={width} is no share of the dense model.ffn={dense}"
        )
    if shared >= dense // width:
        raise ValueError(
            f"train.upcycle: moe.shared={shared} of width {width} leave nothing of the dense "
            f"model.ffn={dense} to the routed experts; lower moe.shared or moe.ffn"
        )
    if new.moe.experts % (dense // width - shared):
        raise ValueError(
            f"train.upcycle: moe.experts={new.moe.experts} is not divisible by the "
            f"{dense // width - shared} shards of width {width} that are routed"
        )


def upcycle(dense: Any, fresh: Any, old: Config, new: Config, *, scaled: bool = True) -> Any:
    """Parameters of the model with experts.

    Args:
      dense: parameters of the dense model, a nested dict as in `TrainState`.
      fresh: parameters of the new model at step 0; its routers are kept.
      old, new: the two configs.
      scaled: False for what has the parameters' form but is none, such as moments: nothing is
        multiplied.

    Raises:
      ValueError: as `check_upcycle`, or arrays of another vocabulary.
    """
    check_upcycle(old, new)
    dense_layers = [
        jax.tree.map(lambda a, r=repeat: a[r], dense["stacks"][stack]["blocks"][block])
        for stack, block, repeat, _ in _places(old)
    ]
    layers: dict[tuple[int, int], list[Any]] = {}
    for layer, (stack, block, repeat, kind) in zip(dense_layers, _places(new), strict=True):
        if kind == "moe":
            own = fresh["stacks"][stack]["blocks"][block]["feed_forward"]
            own = jax.tree.map(lambda a, r=repeat: a[r], own)
            layer = {**layer, "feed_forward": _experts(layer["feed_forward"], own, new, scaled)}
        layers.setdefault((stack, block), []).append(layer)
    stacks: dict[int, Any] = {}
    for (stack, block), repeats in layers.items():
        blocks = stacks.setdefault(stack, {"blocks": {}})["blocks"]
        blocks[block] = jax.tree.map(lambda *a: jnp.stack(a), *repeats)
    made = {**dense, "stacks": stacks}
    for (path, a), b in zip(jax.tree.leaves_with_path(made), jax.tree.leaves(fresh), strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"train.upcycle: {path[-1].key} would have shape {a.shape}, this model has "
                f"{b.shape}"
            )
    return made


def upcycle_state(dense: TrainState, fresh: TrainState, old: Config, new: Config) -> TrainState:
    """The state at which the run with experts begins.

    Without options: step 0 and position 0, so schedule and data start anew, and a fresh optimizer.
    `train.upcycle_optimizer` carries Adam's moments, copied like the weights they belong to (zero
    for routers), and its count. `train.upcycle_step` goes on at the dense run's step: its place in
    the schedule and in the data. The router's state is always fresh.

    Raises:
      ValueError: as `upcycle`.
    """
    move = functools.partial(upcycle, old=old, new=new)
    params = move(dense.params, fresh.params)
    if new.train.upcycle_step:
        fresh = fresh._replace(step=dense.step, position=dense.position)

    def part(mine: Any, theirs: Any = None) -> Any:
        if isinstance(mine, optax.ScaleByScheduleState):
            return mine._replace(count=fresh.step)
        if isinstance(mine, optax.ScaleByAdamState) and theirs is not None:
            mu = move(theirs.mu, mine.mu, scaled=False)
            return theirs._replace(mu=mu, nu=move(theirs.nu, mine.nu, scaled=False))
        return mine

    carried = (dense.opt_state,) if new.train.upcycle_optimizer else ()
    known = (optax.ScaleByScheduleState, optax.ScaleByAdamState)
    opt_state = jax.tree.map(
        part, fresh.opt_state, *carried, is_leaf=lambda state: isinstance(state, known)
    )
    return fresh._replace(params=params, opt_state=opt_state)


def load_dense(workdir: Path, vocab_size: int, mesh: Mesh) -> tuple[TrainState, Config]:
    """The newest state of a dense run, on a mesh, and its config.

    Raises:
      ValueError: no run there, or one of another vocabulary.
      FileNotFoundError: no checkpoint.
    """
    config = dense_config(workdir)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    init = functools.partial(init_state, config=config, vocab_size=vocab_size, optimizer=optimizer)
    abstract = jax.eval_shape(init, 0)
    like = jax.tree.map(
        lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
        abstract,
        shardings(abstract, mesh),
    )
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        state, _ = checkpoints.restore(like)
    finally:
        checkpoints.close()
    return state, config


def dense_config(workdir: Path) -> Config:
    """The config of the run in a folder. Raises ValueError where there is none."""
    try:
        return read_config(workdir)
    except FileNotFoundError as error:
        raise ValueError(f"train.upcycle={error}") from error


def _places(config: Config) -> list[tuple[int, int, int, str]]:
    """(stack, block, repeat, kind) of each layer, from bottom to top."""
    return [
        (stack, block, repeat, kind)
        for stack, (kinds, repeats) in enumerate(layer_stacks(config))
        for repeat in range(repeats)
        for block, kind in enumerate(kinds)
    ]


def _experts(dense: Any, fresh: Any, config: Config, scaled: bool) -> Any:
    """The layer with experts of one dense feed-forward network; expert e is routed shard e mod
    their number."""
    moe, made = config.moe, dict(fresh)
    width = moe.ffn or config.model.ffn
    routed = config.model.ffn // width - moe.shared

    def shards(w_DF: jax.Array) -> jax.Array:
        w_MDF = jnp.moveaxis(w_DF.reshape(w_DF.shape[0], -1, width), 1, 0)
        return jnp.tile(w_MDF[moe.shared :], (moe.experts // routed, 1, 1))

    for name in ("w_in", "w_gate"):
        if f"{name}_DF" in dense:
            made[f"{name}_EDF"] = shards(dense[f"{name}_DF"])
    w_out_EFD = jnp.swapaxes(shards(dense["w_out_FD"].T), 1, 2)
    made["w_out_EFD"] = w_out_EFD * (routed if scaled else 1)
    if moe.shared:
        first = moe.shared * width
        made["shared"] = {
            name: w[:first] if name == "w_out_FD" else w[:, :first] for name, w in dense.items()
        }
    if routed > 1:
        made["w_router_DE"] = jnp.repeat(fresh["w_router_DE"][:, ::routed], routed, axis=1)
    return made
