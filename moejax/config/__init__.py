"""Configuration: an ml_collections ConfigDict at the edge, frozen dataclasses inside.

Whatever is wrong fails here, in one line with the numbers and the fix, before anything compiles.
The dataclasses are the one list of keys and defaults; `default_config` shows them as a ConfigDict,
which experiment files edit and the command line overrides, and `Config.from_dict` checks what came
back.
"""

from moejax.config.edge import default_config, override, router_config
from moejax.config.run import Config
from moejax.config.sections import (
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    RouterConfig,
    TrainConfig,
)
from moejax.data.config import DataConfig

__all__ = [
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "MoeConfig",
    "OptimizerConfig",
    "RouterConfig",
    "TrainConfig",
    "default_config",
    "override",
    "router_config",
]
