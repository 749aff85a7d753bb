"""Configuration: an ml_collections ConfigDict at the edge, frozen dataclasses inside.
 Whatever is wrong fails here, in one line with the numbers and the fix, before anything compiles.
The dataclasses are the one list of keys and defaults; `default_config` shows them as a ConfigDict,
which experiment files edit and the command line overrides, and `Config.from_dict` checks what came
back.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from moejax.data.config import DataConfig
from moejax.dispatch import ACTIVATIONS, DISPATCH, GROUPS
from moejax.names import did_you_mean
from moejax.routing import (
    BALANCE_LOSSES,
    Router,
    RouterInput,
    hyperparameters,
    make_router,
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _one_of(name: str, value: str, known: Mapping[str, Any] | tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}{did_you_mean(value, known)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder-only transformer around the experts.

    Attributes:
      layers, dim, heads: L, D, H. head_dim 0 = dim / heads; kv_heads 0 = heads.
      ffn: F, hidden width of a dense feed-forward layer.
      activation: of dense layers and experts: swiglu, geglu, gelu or relu.
      rope_theta: base of the rotary position embedding.
      init_scale: the variance scale of all weights; Switch uses 0.1.
      dtype: of activations and matmuls, float32 or bfloat16. Parameters and router stay float32.
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    layers: int = 4
    dim: int = 64
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 256
    activation: str = "swiglu"
    rope_theta: float = 10_000.0
    init_scale: float = 1.0
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads", "ffn"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name}={value} must be at least 1")
        _one_of("model.activation", self.activation, ACTIVATIONS)
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        _require(
            self.head_dim > 0 or self.dim % self.heads == 0,
            f"model.dim={self.dim} is not divisible by model.heads={self.heads}; "
            "set model.head_dim",
        )
        _require(
            self.heads % self.key_value_heads == 0,
            f"model.heads={self.heads} is not divisible by model.kv_heads={self.kv_heads}",
        )
        _require(self.width % 2 == 0, f"rotary embedding needs an even head_dim, got {self.width}")
        _require(self.init_scale > 0, f"model.init_scale={self.init_scale} must be above 0")

    @property
    def width(self) -> int:
        """Dimension of one attention head."""
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
      shared: experts that every token uses besides the routed ones, ungated.
      first_dense: this many dense layers come first.
      every: of the layers after those, every n-th has experts.
      dispatch: einsum, gather or dropless.
      capacity_factor: slots of an expert over its fair share of assignments; None = nothing drops.
      eval_capacity_factor: the same in evaluation; None = as in training.
      groups: which tokens compete for slots: batch, sequence, or position (causal expert choice).
      eval_groups: the same in evaluation; '' = as in training.
      jitter: multiplicative noise on the router's input in training (Switch: 0.01).
      router_scale: variance scale of the router's initial weights, times model.init_scale.
    """

    experts: int = 8
    ffn: int = 0
    shared: int = 0
    first_dense: int = 0
    every: int = 1
    dispatch: str = "dropless"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    groups: str = "batch"
    eval_groups: str = ""
    jitter: float = 0.0
    router_scale: float = 1.0

    def __post_init__(self) -> None:
        _require(self.experts >= 0, f"moe.experts={self.experts} must be at least 0 (0 = dense)")
        _require(self.every >= 1, f"moe.every={self.every} must be at least 1")
        for name in ("ffn", "shared", "first_dense", "jitter", "router_scale"):
            value = getattr(self, name)
            _require(value >= 0, f"moe.{name}={value} must not be negative")
        _one_of("moe.dispatch", self.dispatch, DISPATCH)
        _one_of("moe.groups", self.groups, GROUPS)
        _one_of("moe.eval_groups", self.eval_groups or self.groups, GROUPS)
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            _require(
                value is None or (value > 0 and math.isfinite(value)),
                f"moe.{name}={value} leaves no slot (capacity < 1); use a factor > 0, "
                "1 = exactly enough",
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
    """A router by name, or a function (RouterInput, *, options) -> Routing, and its options."""

    name: str | Callable[..., Any] = "topk"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self.make()

    def make(self) -> Router:
        return make_router(self.name, dict(self.options))

    @property
    def label(self) -> str:
        return self.name if isinstance(self.name, str) else self.name.__name__

    @property
    def k(self) -> int | None:
        """Experts per token as configured, or the router's default; None where it has no such
        option."""
        return {**hyperparameters(self.name), **dict(self.options)}.get("k")


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
        _one_of("optimizer.name", self.name, ("adamw", "adafactor"))
        _one_of("optimizer.schedule", self.schedule, ("cosine", "rsqrt", "wsd", "constant"))
        _require(
            self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be above 0"
        )
        for name in ("warmup", "weight_decay", "clip", "final_fraction"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name}={value} must not be negative")
        _require(
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
      keep: checkpoints kept, besides the best one by validation bits per byte.
      collapse_share: the alarm: warn when one expert gets this share of its layer's tokens in three
        logged steps in a row.
    """

    steps: int = 200
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 50
    eval_rows: int = 256
    checkpoint_every: int = 100
    keep: int = 2
    collapse_share: float = 0.9

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every", "keep"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name}={value} must be at least 1")
        for name in ("eval_every", "checkpoint_every", "eval_rows", "seed"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name}={value} must not be negative")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 for one of them = all that are left."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        _require(sizes.count(-1) <= 1, f"mesh {sizes}: only one axis can be -1")
        _require(all(s == -1 or s >= 1 for s in sizes), f"mesh {sizes}: sizes are >= 1, or -1")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Hashable, so that whatever compiles for it can be cached by it.

    Attributes:
      balance: loss name -> weight, the names of BALANCE_LOSSES.
    """

    model: ModelConfig = ModelConfig()
    moe: MoeConfig = MoeConfig()
    router: RouterConfig = RouterConfig()
    balance: tuple[tuple[str, float], ...] = tuple((name, 0.0) for name in BALANCE_LOSSES)
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        for name, weight in self.balance:
            _one_of("balance loss", name, BALANCE_LOSSES)
            _require(weight >= 0, f"balance.{name}={weight} must not be negative")
        batch, parts = self.data.batch, self.train.accumulation
        _require(
            batch % parts == 0,
            f"data.batch={batch} is not divisible by train.accumulation={parts}",
        )
        if self.moe.experts:
            self._check_moe()

    def _check_moe(self) -> None:
        moe, k = self.moe, self.router.k
        if k is not None:
            _require(k >= 1, f"router.k={k} must be at least 1")
            _require(
                k <= moe.experts,
                f"router.k={k} is more than moe.experts={moe.experts}; lower k or add experts",
            )
        _require(
            moe.first_dense < self.model.layers,
            f"moe.first_dense={moe.first_dense} leaves none of model.layers={self.model.layers}",
        )
        rest = self.model.layers - moe.first_dense
        _require(
            rest % moe.every == 0,
            f"the {rest} layers after moe.first_dense={moe.first_dense} are not divisible by "
            f"moe.every={moe.every}",
        )
        rows = self.data.batch // self.train.accumulation
        if self.router.name == "expert_choice" and k is not None:
            for groups in {moe.groups, moe.evaluation().groups}:
                tokens = {"batch": rows * self.data.sequence, "sequence": self.data.sequence}
                size = tokens.get(groups, rows)
                _require(
                    k * size >= moe.experts,
                    f"expert_choice with groups={groups!r}: capacity k x tokens / experts = {k} x "
                    f"{size} / {moe.experts} < 1; raise data.batch or router.k, or lower "
                    "moe.experts",
                )
        _ = self.choices  # traces the router once, so that what it refuses is refused here

    @property
    def moe_layers(self) -> int:
        if not self.moe.experts:
            return 0
        return (self.model.layers - self.moe.first_dense) // self.moe.every

    @functools.cached_property
    def choices(self) -> float:
        """Experts per token: assignments over tokens, N / T, of what the router returns; 0 if
        dense."""
        experts = self.moe.experts
        if not experts:
            return 0.0
        tokens, router = max(self.data.sequence, experts), self.router.make()
        r = RouterInput(
            logits_TE=jax.ShapeDtypeStruct((tokens, experts), jnp.float32),
            valid_T=jax.ShapeDtypeStruct((tokens,), jnp.bool_),
            state=jax.eval_shape(lambda: router.init(experts)),
            token_T=jax.ShapeDtypeStruct((tokens,), jnp.int32),
        )
        return jax.eval_shape(router.route, r).token_N.shape[0] / tokens

    @property
    def leaks(self) -> bool:
        """Whether training lets a token's output depend on later tokens of its sequence.

        Expert choice does unless only one position competes; so does a binding capacity with K > 1
        when all first choices go before any second one.
        """
        if not self.moe.experts or self.moe.groups == "position":
            return False
        spec = self.router.make().spec
        if spec is not None and spec.chooses == "expert":
            return True
        options = {**hyperparameters(self.router.name), **dict(self.router.options)}
        order = options.get("order", "k_major")
        factor = self.moe.capacity_factor
        binding = factor is not None and factor * self.choices < self.moe.experts
        return binding and self.choices > 1 and order == "k_major"

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any] | ConfigDict) -> "Config":
        """The checked config of a nested dict or ConfigDict.

        Raises:
          ValueError: unknown key (with the nearest known one), wrong type, or a value out of range.
        """
        tree = tree.to_dict() if isinstance(tree, ConfigDict) else dict(tree)
        sections: dict[str, Any] = {}
        fields = typing.get_type_hints(cls)
        for name, value in tree.items():
            _one_of("config key", name, fields)
            if not isinstance(value, Mapping):
                raise ValueError(f"{name}={value!r} is a {type(value).__name__}, must be a section")
            if name == "router":
                sections[name] = _router(value)
            elif name == "balance":
                sections[name] = tuple(
                    (key, _typed(f"balance.{key}", weight, float)) for key, weight in value.items()
                )
            else:
                sections[name] = _section(name, fields[name], value)
        return cls(**sections)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as written to config.json; `from_dict` of it gives an equal
        config."""
        tree = {name: dataclasses.asdict(getattr(self, name)) for name in _SECTIONS}
        tree["router"] = {"name": self.router.name, **dict(self.router.options)}
        tree["balance"] = dict(self.balance)
        return tree


_SECTIONS = ("model", "moe", "data", "optimizer", "train", "mesh")


def default_config() -> ConfigDict:
    """Every key with its default, as an editable, type-checked ConfigDict."""
    tree = Config().to_dict()
    tree["router"] = {"name": "topk", **hyperparameters("topk")}
    config = ConfigDict(tree)
    for name in ("capacity_factor", "eval_capacity_factor"):
        config.moe[name] = placeholder(float)
    return config


def router_config(name: str | Callable[..., Any], **options: Any) -> ConfigDict:
    """The `router` section for one router, by name or as a function: all its options, some set.

    Raises:
      ValueError: unknown router or option.
    """
    make_router(name, options)
    return ConfigDict({"name": name, **hyperparameters(name), **options})


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _router(values: Mapping[str, Any]) -> RouterConfig:
    """An option has the type of its default; RouterConfig itself refuses one that is unknown."""
    router = values.get("name", "topk")
    defaults = hyperparameters(router)
    options = {name: _freeze(value) for name, value in values.items() if name != "name"}
    for name, value in options.items():
        if isinstance(defaults.get(name), bool | int | float | str):
            options[name] = _typed(f"router.{name}", value, type(defaults[name]))
    return RouterConfig(router, tuple(options.items()))


def _section(section: str, cls: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        if name not in hints:
            known = [f"{section}.{key}" for key in hints]
            raise ValueError(
                f"unknown config key {section}.{name}{did_you_mean(f'{section}.{name}', known)}"
            )
        checked[name] = _typed(f"{section}.{name}", _freeze(value), hints[name])
    return cls(**checked)


def _typed(name: str, value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}, must be {wanted}")
    return value


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of a ConfigDict with dotted keys set, e.g. {"router.name": "switch", "moe.every": 2}.

    A new router.name brings that router's own options, at their defaults.

    Raises:
      ValueError: unknown key, with the nearest known one; or a value of another type.
    """
    config = ConfigDict(config.copy_and_resolve_references())
    if "router.name" in overrides:
        config.router = router_config(overrides["router.name"])
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        _one_of("config key", section, tuple(config))
        _one_of(f"key of {section}", name, tuple(config[section]))
        config[section] = ConfigDict({**config[section].to_dict(), name: value})
    return config
