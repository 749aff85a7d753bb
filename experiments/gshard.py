"""GShard: top-2 with a random second expert (Lepikhin et al. 2020, 2006.16668).

    moejax train --config=experiments/gshard.py:smoke --workdir=/tmp/gshard

Experts are half as wide and twice as many as Switch's: same active and same total parameters.
"""

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.get_config(scale)
    config.router = router_config("gshard_top2")
    config.moe.update(experts=2 * config.moe.experts, ffn=config.model.ffn // 2)
    config.moe.update(dispatch="gather", capacity_factor=1.0, eval_capacity_factor=2.0)
    config.balance.load_balance_top1 = 0.01
    return config
