"""GShard 600B: top-2 of 2,048 experts in every second layer (Lepikhin et al. 2020, 2006.16668).

    moejax plan experiments/pods/gshard_600b.py --topology=v4:8x8x16
    moejax train --config=experiments/pods/gshard_600b.py --workdir=gs://BUCKET/gshard_600b

A decoder-only twin of the translation model: 36 layers for its 18 + 18, 18 of them with the same
experts; one vocabulary, the source's 64,000. As there, all is float32, with one expert a core.
Tokens compete within their sequence; C = 2 S / E slots an expert is a capacity factor of 1. Dropout
(.1) is left out; Adafactor is optax's; the rate warms up over the 10,000 steps in which the paper's
is constant.
"""

from ml_collections import ConfigDict

from moejax.config import default_config, router_config

TOPOLOGY = "v4:8x8x16"


def get_config(scale: str = "full") -> ConfigDict:
    if scale != "full":
        raise ValueError(f"unknown scale {scale!r}; known: full")
    config = default_config()
    config.model.update(layers=36, dim=1024, heads=16, head_dim=128, ffn=8192, activation="relu")
    config.model.update(remat="full")
    config.router = router_config("gshard_top2")
    config.moe.update(experts=2048, every=2, dispatch="gather", groups="sequence")
    config.moe.update(capacity_factor=1.0, eval_capacity_factor=1.0)
    config.balance.load_balance_top1 = 0.01
    config.data.update(name="c4", tokenizer="bpe:64000", sequence=1024, batch=4096)
    config.optimizer.update(name="adafactor", schedule="rsqrt", learning_rate=1.0, warmup=10_000)
    config.optimizer.update(weight_decay=0.0, clip=1.0)
    config.train.update(steps=250_000, log_every=100, eval_every=5_000, checkpoint_every=1_000)
    config.mesh.update(data=1, expert=2048)  # a v4 chip is two devices
    return config
