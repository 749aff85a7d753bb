"""Switch Transformer: does top-1 routing with a balance loss train (Fedus et al. 2021, 2101.03961)?

moejax train --config=experiments/switch.py:smoke --workdir=/tmp/switch
"""

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.get_config(scale)
    config.router = router_config("switch")
    config.moe.update(dispatch="gather", capacity_factor=1.25, eval_capacity_factor=2.0)
    config.moe.update(jitter=0.01, router_scale=0.1)
    config.balance.load_balance = 0.01
    return config
