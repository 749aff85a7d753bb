"""Expert choice: experts pick tokens (Zhou et al. 2022, 2202.09368).

    moejax train --config=experiments/expert_choice.py:smoke --workdir=/tmp/expert_choice

Trained on the pool of the whole batch, which lets a decoder see the future; evaluated causally,
where only tokens at one position of different sequences compete. The difference of the two is the
leak.
"""

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.get_config(scale)
    config.router = router_config("expert_choice", k=2)
    config.moe.update(experts=2 * config.moe.experts, ffn=config.model.ffn // 2)
    config.moe.update(dispatch="gather", capacity_factor=1.0, eval_groups="position")
    return config
