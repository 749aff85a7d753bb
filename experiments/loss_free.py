"""Auxiliary-loss-free balancing: a bias instead of a loss (Wang et al. 2024, 2408.15664).

    moejax train --config=experiments/loss_free.py:smoke --workdir=/tmp/loss_free

The paper's bias_rate of 1e-3 is for 40,000 steps; |b| is at most rate x steps, so short runs use
1e-2.
"""

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.get_config(scale)
    rate = 1e-2 if scale == "smoke" else 1e-3
    config.router = router_config("loss_free", k=2, bias_rate=rate)
    config.moe.update(experts=2 * config.moe.experts, ffn=config.model.ffn // 2)
    return config
