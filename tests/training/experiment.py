"""The experiment that the tests of killed runs start: the tiny model with a router that has a
state."""

from ml_collections import ConfigDict

from moejax.config import default_config, override
from tests.tiny import LOSS_FREE, SIZES

STEPS = 60


def get_config() -> ConfigDict:
    changes = {f"router.{key}": value for key, value in LOSS_FREE.items()}
    saving = {"steps": STEPS, "log_every": 3, "eval_every": 7, "checkpoint_every": 5}
    changes |= {f"train.{key}": value for key, value in saving.items()}
    return override(default_config(), {**SIZES, **changes})
