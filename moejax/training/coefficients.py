"""The numbers of a config that are arguments of its program: runs that differ only in them, as a
sweep's do, share one compilation."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from moejax.config import Config, TrainConfig
from moejax.data import DataConfig


class Coefficients(NamedTuple):
    """Float32 scalars.

    Attributes:
      learning_rate: the peak.
      balance: balance loss -> its weight, of those whose weight is not 0.
      router: the rates at which the router's state moves, by name: see `update_rates`.
    """

    learning_rate: ArrayLike
    balance: dict[str, ArrayLike]
    router: dict[str, ArrayLike]


def coefficients(config: Config) -> Coefficients:
    """A config's own."""
    balance: dict[str, ArrayLike] = {
        name: np.float32(weight) for name, weight in config.balance if weight
    }
    router: dict[str, ArrayLike] = {n: np.float32(rate) for n, rate in config.router.rates.items()}
    return Coefficients(np.float32(config.optimizer.learning_rate), balance, router)


def abstract_coefficients(config: Config, sharding: jax.sharding.Sharding) -> Coefficients:
    """The shapes of a config's own."""
    scalar = jax.ShapeDtypeStruct((), np.float32, sharding=sharding)
    return jax.tree.map(lambda _: scalar, coefficients(config))


def compiled_in(config: Config) -> Config:
    """The config with 1, or the default, for each of its coefficients and for what only its first
    weights depend on, and without the seed, the text and the saving of a run."""
    data, train, router = config.data, config.train, config.router
    options = tuple((name, value) for name, value in router.options if name not in router.rates)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, init_scale=1.0),
        moe=dataclasses.replace(config.moe, router_scale=1.0),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0),
        balance=tuple((name, float(weight > 0)) for name, weight in config.balance),
        router=dataclasses.replace(router, options=options),
        data=DataConfig(sequence=data.sequence, batch=data.batch, mask_rate=data.mask_rate),
        train=TrainConfig(
            steps=train.steps,
            accumulation=train.accumulation,
            trace_every=int(train.trace_every > 0),
        ),
    )
