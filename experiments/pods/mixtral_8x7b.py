"""Mixtral 8x7B: eight large experts, two a token (Jiang et al. 2024, 2401.04088).

    moejax plan experiments/pods/mixtral_8x7b.py --topology=v5p:4x4x8
    moejax train --config=experiments/pods/mixtral_8x7b.py --workdir=gs://BUCKET/mixtral_8x7b

The paper has the architecture and its context of 32,768 tokens; it says nothing of training: batch,
rate and steps here are ours. At so long a row attention goes by blocks of queries.
"""

from ml_collections import ConfigDict

from moejax.config import default_config, router_config

TOPOLOGY = "v5p:4x4x8"


def get_config(scale: str = "full") -> ConfigDict:
    if scale != "full":
        raise ValueError(f"unknown scale {scale!r}; known: full")
    config = default_config()
    config.model.update(layers=32, dim=4096, heads=32, kv_heads=8, ffn=14336, rope_theta=1e6)
    config.model.update(dtype="bfloat16", remat="full", query_block=512)
    config.router = router_config("topk", k=2, renormalise=True)
    config.moe.experts = 8
    config.balance.load_balance = 0.01
    config.data.update(name="c4", tokenizer="bpe:32000", sequence=32768, batch=64)
    config.optimizer.update(learning_rate=3e-4, warmup=2_000)
    config.train.update(steps=250_000, log_every=100, eval_every=5_000, checkpoint_every=1_000)
    config.mesh.update(data=1, fsdp=64, tensor=2)
    return config
