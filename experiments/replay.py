r"""Replay: does a model need its own router, or would another run's choices do as well?

    moejax train --config=experiments/loss_free.py:smoke --workdir=/tmp/a \
        --config.train.trace_every=1
    moejax train --config=experiments/replay.py:smoke --workdir=/tmp/b \
        --config.train.replay=/tmp/a --config.train.seed=1

The second run has other weights, reads the first one's rows in its order and follows its routing;
its router only learns to weigh what was chosen for it. With the first run's seed the losses are the
first run's.
"""

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.get_config(scale)
    config.router = router_config("replay", k=2, weight="sigmoid", order="token_major")
    config.moe.update(experts=2 * config.moe.experts, ffn=config.model.ffn // 2)
    return config
