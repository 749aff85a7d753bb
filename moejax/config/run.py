"""`Config`: one run, checked as a whole."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moejax.causality import Dependence, dependence
from moejax.config.sections import (
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    RouterConfig,
    TrainConfig,
    one_of,
    require,
)
from moejax.data.config import DataConfig
from moejax.dispatch import make_plan
from moejax.moe import MoeOptions
from moejax.names import did_you_mean
from moejax.routing import (
    BALANCE_LOSSES,
    LayerSize,
    MoeStats,
    Recorded,
    RouterInput,
    Routing,
    hyperparameters,
    moe_stats,
)
from moejax.routing.balance import balance_losses


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
            one_of("balance loss", name, BALANCE_LOSSES)
            require(weight >= 0, f"balance.{name}={weight} must not be negative")
        batch, parts = self.data.batch, self.train.accumulation
        require(
            batch % parts == 0,
            f"data.batch={batch} is not divisible by train.accumulation={parts}",
        )
        require(
            not self.model.query_block or self.data.sequence % self.model.query_block == 0,
            f"data.sequence={self.data.sequence} is not divisible by "
            f"model.query_block={self.model.query_block}",
        )
        require(
            bool(self.moe.experts) or not self.train.trace_every,
            f"train.trace_every={self.train.trace_every}, but moe.experts=0 routes nothing",
        )
        require(
            not self.train.replay or self.router.name == "replay" or self.router.custom,
            f"train.replay is for router.name='replay', not {self.router.label!r}",
        )
        if self.moe.experts:
            self._check_moe()

    def _check_moe(self) -> None:
        moe, k = self.moe, None if self.moe.slots else self.router.k
        if k is not None:
            require(k >= 1, f"router.k={k} must be at least 1")
            require(
                k <= moe.experts,
                f"router.k={k} is more than moe.experts={moe.experts}; lower k or add experts",
            )
        require(
            moe.first_dense < self.model.layers,
            f"moe.first_dense={moe.first_dense} leaves no layer of "
            f"model.layers={self.model.layers}",
        )
        rest = self.model.layers - moe.first_dense
        require(
            rest % moe.every == 0,
            f"the {rest} layers after moe.first_dense={moe.first_dense} are not divisible by "
            f"moe.every={moe.every}",
        )
        if moe.slots:
            for name, weight in self.balance:
                require(
                    weight == 0,
                    f"moe.slots={moe.slots} (Soft MoE) is balanced by design: "
                    f"balance.{name}={weight} must be 0",
                )
            kept = self.train.trace_every or self.train.replay
            require(not kept, f"moe.slots={moe.slots} (Soft MoE) has no routing to trace or replay")
            require(
                not self.train.eval_without,
                f"train.eval_without=True asks routers, and moe.slots={moe.slots} (Soft MoE) has "
                "none; leave it out",
            )
            return
        for groups in {moe.groups, moe.evaluation().groups}:
            try:  # what the router or a balance loss refuses, is refused here
                self._trace(groups)
            except ValueError as error:
                raise ValueError(f"moe.groups={groups!r}: {error}") from None
            except OverflowError:
                rows = self.data.batch // self.train.accumulation
                raise ValueError(
                    f"{rows} x {self.data.sequence} tokens of a microbatch make 2^31 assignments "
                    "or more; raise train.accumulation"
                ) from None

    @property
    def moe_layers(self) -> int:
        if not self.moe.experts:
            return 0
        return (self.model.layers - self.moe.first_dense) // self.moe.every

    def _trace(self, groups: str) -> tuple[Routing, MoeStats]:
        """Shapes of what one group of tokens gives, before anything is compiled."""
        experts, rows = self.moe.experts, self.data.batch // self.train.accumulation
        sizes = {"batch": rows * self.data.sequence, "sequence": self.data.sequence}
        tokens, router = sizes.get(groups, rows), self.router.make()

        def layer() -> tuple[Routing, MoeStats]:
            ids_T = jnp.zeros(tokens, jnp.int32)
            r = RouterInput(
                logits_TE=jnp.zeros((tokens, experts)),
                valid_T=jnp.ones(tokens, bool),
                key=jax.random.split(jax.random.key(0), tokens),
                state=router.init(LayerSize(experts, self.model.dim, 256, jnp.ones(256))),
                token_T=ids_T,
                next_T=ids_T,
                extra_TX=jnp.zeros((tokens, router.columns(experts))),
                recorded=Recorded(ids_T[:, None], jnp.zeros((tokens, 1))),
            )
            routing = router.route(r)
            stats = moe_stats(r, routing, make_plan(routing, None))
            balance_losses(jax.tree.map(lambda a: a[None], stats), dict(self.balance))
            return routing, stats

        return jax.eval_shape(layer)

    @functools.cached_property
    def choices(self) -> float:
        """Experts per token: the router's k, or where it has none, assignments over tokens, N / T,
        of what it returns; slots over tokens if soft; 0 if dense."""
        if not self.moe.experts:
            return 0.0
        if self.moe.slots:
            return self.moe.slots * self.moe.experts / self.data.sequence
        if self.router.k is not None:
            return float(self.router.k)
        routing, _ = self._trace(self.moe.groups)
        return routing.token_N.shape[0] / routing.scores_TE.shape[0]

    @property
    def computed(self) -> float:
        """Experts that the training step computes for a token: E for routers that ask all of them,
        however few count; else `choices`."""
        spec = None if self.moe.slots else self.router.make().spec
        every = spec is not None and spec.every_expert
        return float(self.moe.experts) if every and self.moe.experts else self.choices

    @functools.cached_property
    def dependence(self) -> Dependence | None:
        """On which other tokens an MoE layer's output depends in training; None if dense."""
        if not self.moe.experts:
            return None
        if self.moe.slots:  # softmax over the tokens of a sequence: no trial is needed
            return Dependence(later=True, later_gradient=True, others=False, others_gradient=False)
        options = MoeOptions(
            self.router.make(),
            capacity_factor=self.moe.capacity_factor,
            groups=self.moe.groups,
        )
        found = dependence(options, self.moe.experts)
        # Rows of other sequences may take the room that a device has; never those of later tokens.
        bounded = self.moe.buffer_factor is not None and self.mesh.expert > 1
        return found._replace(others=found.others or bounded)

    @property
    def causal(self) -> bool:
        """Whether tokens are predicted from earlier ones only, as they are unless some are
        masked."""
        return not self.data.mask_rate

    @property
    def leaks(self) -> bool:
        """Whether training lets a token's output depend on later tokens of its sequence where it
        must not, as `moejax.causality` finds by trying."""
        return self.causal and self.dependence is not None and not self.dependence.causal

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
            one_of("config key", name, fields)
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
