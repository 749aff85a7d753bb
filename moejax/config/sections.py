"""The sections of a config: frozen dataclasses that refuse bad values with numbers and the fix."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from moejax.dispatch import ACTIVATIONS, DISPATCH, GROUPS
from moejax.names import did_you_mean
from moejax.routing import (
    AnyRouter,
    Router,
    hyperparameters,
    make_router,
    router_name,
    update_rates,
)


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def one_of(name: str, value: str, known: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Raise ValueError, with the nearest known value, unless the value is a known one."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}{did_you_mean(value, known)}")


REMAT = ("none", "full", "routing")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder-only transformer around the experts.

    Attributes:
      layers, dim, heads: L, D, H. head_dim 0 = dim / heads; kv_heads 0 = heads.
      attention: grouped (kv_heads shared by heads) or latent (see `moejax.model.latent`): keys and
        values of a latent of kv_rank, queries of one of q_rank (0 = of the input), heads of
        head_dim and, for queries and keys, rope_dim more that carry the position.
      qk_norm: RMSNorm over all heads' queries together, and over all keys. Grouped attention only.
      query_block: compute attention so many queries at a time; 0 = all at once.
      ffn: F, hidden width of a dense feed-forward layer.
      activation: of dense layers and experts: swiglu, geglu, gelu or relu.
      rope_theta: base of the rotary position embedding.
      init_scale: the variance scale of all weights; Switch uses 0.1.
      dtype: of activations and matmuls, float32 or bfloat16. Parameters and router stay float32.
      remat: what is computed again in the backward pass, instead of being kept: none; full, each
        layer from its input; routing, the same, but the router's choices and the order of rows are
        kept.
    """

    layers: int = 4
    dim: int = 64
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    attention: str = "grouped"
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    qk_norm: bool = False
    query_block: int = 0
    ffn: int = 256
    activation: str = "swiglu"
    rope_theta: float = 10_000.0
    init_scale: float = 1.0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads", "ffn"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}={value} must be at least 1")
        one_of("model.activation", self.activation, ACTIVATIONS)
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("model.remat", self.remat, REMAT)
        require(
            self.head_dim > 0 or self.dim % self.heads == 0,
            f"model.dim={self.dim} is not divisible by model.heads={self.heads}; "
            "set model.head_dim",
        )
        require(
            self.heads % self.key_value_heads == 0,
            f"model.heads={self.heads} is not divisible by model.kv_heads={self.kv_heads}",
        )
        one_of("model.attention", self.attention, ("grouped", "latent"))
        if self.attention == "latent":
            self._check_latent()
        else:
            self._check_grouped()
        require(self.query_block >= 0, f"model.query_block={self.query_block} must not be negative")
        require(self.init_scale > 0, f"model.init_scale={self.init_scale} must be above 0")

    def _check_grouped(self) -> None:
        require(self.width % 2 == 0, f"rotary embedding needs an even head_dim, got {self.width}")
        for name in ("q_rank", "kv_rank", "rope_dim"):
            value = getattr(self, name)
            require(value == 0, f"model.{name}={value} is for model.attention='latent'")

    def _check_latent(self) -> None:
        require(self.q_rank >= 0, f"model.q_rank={self.q_rank} must not be negative")
        require(
            self.kv_rank >= 1, f"model.attention='latent' needs model.kv_rank={self.kv_rank} >= 1"
        )
        require(
            self.rope_dim >= 2 and self.rope_dim % 2 == 0,
            f"model.attention='latent' needs an even model.rope_dim >= 2, got {self.rope_dim}",
        )
        require(
            self.key_value_heads == self.heads,
            f"model.kv_heads={self.kv_heads} is for model.attention='grouped'; latent attention "
            f"has keys for all {self.heads} heads, leave it 0",
        )
        require(not self.qk_norm, "model.qk_norm=True is for model.attention='grouped'")

    @property
    def width(self) -> int:
        """Dimension of one attention head; in latent attention without its rotary part."""
        return self.head_dim or self.dim // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Which layers have experts, and how tokens reach them.

    Attributes:
      experts: E routed experts; 0 = a dense model.
      ffn: hidden width of an expert; 0 = model.ffn. Fine-grained experts have a smaller one.
      slots: 0 = tokens are routed; above 0 = Soft MoE: each expert works on so many mixtures of all
        tokens of a sequence. Then router, dispatch and groups are not used.
      shared: experts that every token uses besides the routed ones, ungated.
      first_dense: this many dense layers come first.
      every: of the layers after those, every n-th has experts.
      dispatch: einsum, gather or dropless. On a mesh, gather keeps its buffers with
        groups=sequence only, and else moves tokens as dropless does, with the same drops.
      capacity_factor: slots of an expert over its fair share of assignments; None = nothing drops.
      eval_capacity_factor: the same in evaluation; None = as in training.
      buffer_factor: with dropless on a mesh with an axis `expert`: the rows that a device has room
        for, over its fair share; what does not fit drops. None = for all rows, whatever the load:
        as many times the memory traffic of an even load as that axis has devices.
      groups: which tokens compete for slots: batch, sequence, or position (causal expert choice).
      eval_groups: the same in evaluation; '' = as in training.
      jitter: multiplicative noise on the router's input in training (Switch: 0.01).
      router_scale: variance scale of the router's initial weights, times model.init_scale.
    """

    experts: int = 8
    ffn: int = 0
    slots: int = 0
    shared: int = 0
    first_dense: int = 0
    every: int = 1
    dispatch: str = "dropless"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    buffer_factor: float | None = None
    groups: str = "batch"
    eval_groups: str = ""
    jitter: float = 0.0
    router_scale: float = 1.0

    def __post_init__(self) -> None:
        require(self.experts >= 0, f"moe.experts={self.experts} must be at least 0 (0 = dense)")
        require(self.every >= 1, f"moe.every={self.every} must be at least 1")
        for name in ("ffn", "slots", "shared", "first_dense", "jitter", "router_scale"):
            value = getattr(self, name)
            require(value >= 0, f"moe.{name}={value} must not be negative")
        one_of("moe.dispatch", self.dispatch, DISPATCH)
        one_of("moe.groups", self.groups, GROUPS)
        one_of("moe.eval_groups", self.eval_groups or self.groups, GROUPS)
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            require(
                value is None or (value > 0 and math.isfinite(value)),
                f"moe.{name}={value} leaves no slot (capacity < 1); use a factor > 0, "
                "1 = exactly enough",
            )
        factor = self.buffer_factor
        require(
            factor is None or (factor >= 1 and math.isfinite(factor)),
            f"moe.buffer_factor={factor} is less than a device's fair share of rows; use 1 or "
            "more, or None for room for all",
        )
        by_sequence = "sequence" in (self.groups, self.eval_groups)
        require(
            factor is None
            or self.dispatch == "dropless"
            or (self.dispatch == "gather" and not by_sequence),
            f"moe.buffer_factor={factor} is for rows that travel sorted, moe.dispatch="
            f"{self.dispatch!r} has buffers by moe.capacity_factor; set moe.dispatch='dropless'",
        )
        if self.slots:
            require(
                self.experts > 0, f"moe.slots={self.slots} (Soft MoE) needs moe.experts above 0"
            )
            for name in ("capacity_factor", "eval_capacity_factor", "buffer_factor", "jitter"):
                value = getattr(self, name)
                require(
                    not value,
                    f"moe.slots={self.slots} (Soft MoE) has no capacity and no router's input: "
                    f"moe.{name}={value} must be left out",
                )

    def evaluation(self) -> "MoeConfig":
        """The same layer as evaluation runs it."""
        factor = self.eval_capacity_factor
        return dataclasses.replace(
            self,
            capacity_factor=self.capacity_factor if factor is None else factor,
            groups=self.eval_groups or self.groups,
        )


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """A router by name, a function (RouterInput, *, options) -> Routing, or a `RouterSpec`; and its
    options."""

    name: AnyRouter = "topk"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self.make()

    def make(self) -> Router:
        """The same `Router` object for equal configs, so that what is cached by it is found."""
        return _make(self)

    @property
    def label(self) -> str:
        return router_name(self.name)

    @property
    def rates(self) -> dict[str, float]:
        """The `update_rates` as configured."""
        given = dict(self.options)
        return {name: given.get(name, rate) for name, rate in update_rates(self.name).items()}

    @property
    def custom(self) -> bool:
        """Whether it is a user's own."""
        return not isinstance(self.name, str)

    @property
    def k(self) -> int | None:
        """Experts per token as configured, or the router's default; None where it has no such
        option."""
        return {**hyperparameters(self.name), **dict(self.options)}.get("k")


@functools.cache
def _make(config: RouterConfig) -> Router:
    return make_router(config.name, dict(config.options))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule.

    Attributes:
      name: adamw or adafactor.
      learning_rate: the peak.
      schedule: cosine (to final_fraction of the peak), rsqrt (peak x sqrt(warmup / step)), wsd
        (constant, then linear to final_fraction over the last decay_fraction), or constant.
      warmup: steps of linear warm-up.
      weight_decay: decoupled, on matrices only.
      clip: global gradient norm; 0 = off.
    """

    name: str = "adamw"
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup: int = 20
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, ("adamw", "adafactor"))
        one_of("optimizer.schedule", self.schedule, ("cosine", "rsqrt", "wsd", "constant"))
        require(
            self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be above 0"
        )
        for name in ("warmup", "weight_decay", "clip", "final_fraction"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name}={value} must not be negative")
        require(
            0 < self.decay_fraction <= 1,
            f"optimizer.decay_fraction={self.decay_fraction} must be in (0, 1]",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: optimizer steps.
      accumulation: microbatches an optimizer step is cut into; same result, less memory.
      seed: of initialisation, data order and noise.
      log_every, eval_every, checkpoint_every: in steps; 0 = at the end only.
      eval_rows: validation sequences per evaluation; 0 = all.
      eval_without: the last evaluation also counts what text costs without the shared experts, and
        without each token's best ones: see `moejax.training.ablate`. Nothing where moe.experts=0.
      keep: checkpoints kept, besides the best one by validation bits per byte.
      collapse_share: the alarm: warn when one expert gets this share of its layer's tokens in three
        logged steps in a row.
      upcycle: the working directory of a dense run whose weights this one starts from; '' = none.
        Read at the first start only: see `moejax.training.upcycle`.
      upcycle_optimizer: carry its optimizer's moments too.
      upcycle_step: go on at its step, in the schedule and the data, instead of at step 0.
      trace_every: write the routing of every so many-th step, token by token, into WORKDIR/trace; 0
        = none, 1 = all.
      replay: the working directory of a run that wrote all; the router `replay` follows its
        routing, on its rows in its order.
    """

    steps: int = 200
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 50
    eval_rows: int = 256
    eval_without: bool = False
    checkpoint_every: int = 100
    keep: int = 2
    collapse_share: float = 0.9
    upcycle: str = ""
    upcycle_optimizer: bool = False
    upcycle_step: bool = False
    trace_every: int = 0
    replay: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every", "keep"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name}={value} must be at least 1")
        for name in ("eval_every", "checkpoint_every", "eval_rows", "seed", "trace_every"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}={value} must not be negative")
        for name in ("upcycle_optimizer", "upcycle_step"):
            require(
                bool(self.upcycle) or not getattr(self, name),
                f"train.{name} needs train.upcycle, the working directory of a dense run",
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 for one of them = all that are left."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        require(sizes.count(-1) <= 1, f"mesh {sizes}: only one axis can be -1")
        require(all(s == -1 or s >= 1 for s in sizes), f"mesh {sizes}: sizes are >= 1, or -1")
