"""Switch-C: does top-1 routing hold with 2,048 experts (Fedus et al. 2021, 2101.03961, table 9)?

    moejax plan experiments/pods/switch_c.py --topology=v5p:8x8x8
    moejax train --config=experiments/pods/switch_c.py --workdir=gs://BUCKET/switch_c

A decoder-only twin of the encoder-decoder: 30 layers for its 15 + 15, all with the same experts, so
the same 1,571 billion parameters but for cross-attention; rotary for relative positions; next
tokens for span corruption. A sequence is as long as the release's group of 2,048 tokens, so that
capacity is the published one. The first 10,000 steps warm up, the paper's rate is constant there.
"""

from ml_collections import ConfigDict

from moejax.config import default_config, router_config
from moejax.routing.conventions import to_moejax

TOPOLOGY = "v5p:8x8x8"


def get_config(scale: str = "full") -> ConfigDict:
    if scale != "full":
        raise ValueError(f"unknown scale {scale!r}; known: full")
    config = default_config()
    config.model.update(layers=30, dim=2080, heads=32, head_dim=64, ffn=6144, activation="relu")
    config.model.update(init_scale=0.1, dtype="bfloat16", remat="full")
    config.router = router_config("switch")
    config.moe.update(experts=2048, dispatch="gather", groups="sequence", jitter=0.01)
    config.moe.update(capacity_factor=1.0, eval_capacity_factor=2.0)
    config.balance.update(to_moejax("switch", 0.01, k=1, experts=2048, layers=30))
    config.data.update(name="c4", tokenizer="bpe:32128", sequence=2048, batch=512)
    config.optimizer.update(name="adafactor", schedule="rsqrt", learning_rate=0.01, warmup=10_000)
    config.optimizer.update(weight_decay=0.0, clip=0.0)
    config.train.update(steps=500_000, log_every=100, eval_every=5_000, checkpoint_every=1_000)
    config.mesh.update(data=1, expert=512)
    return config
