"""The edge: the same keys as an editable, type-checked ml_collections ConfigDict."""

import copy
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from moejax.config.run import Config
from moejax.config.sections import one_of
from moejax.routing import AnyRouter, hyperparameters, make_router


def default_config() -> ConfigDict:
    """Every key with its default, as an editable, type-checked ConfigDict."""
    tree = Config().to_dict()
    tree["router"] = {"name": "topk", **hyperparameters("topk")}
    config = ConfigDict(tree)
    for name in ("capacity_factor", "eval_capacity_factor", "buffer_factor"):
        config.moe[name] = placeholder(float)
    return config


def router_config(name: AnyRouter, **options: Any) -> ConfigDict:
    """The `router` section for one router, by name, function or spec: all its options, some set.

    Raises:
      ValueError: unknown router or option.
    """
    make_router(name, options)
    return ConfigDict({"name": name, **hyperparameters(name), **options})


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of a ConfigDict with dotted keys set, e.g. {"router.name": "switch", "moe.every": 2}.

    A new router.name brings that router's own options, at their defaults.

    Raises:
      ValueError: unknown key, with the nearest known one.
    """
    config = copy.deepcopy(config)
    if "router.name" in overrides:
        config.router = router_config(overrides["router.name"])
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        one_of("config key", section, tuple(config))
        one_of(f"key of {section}", name, tuple(config[section]))
        with config.ignore_type():  # `Config.from_dict` judges types, by the field's own
            config[section][name] = value
    return config
