"""OLMoE-1B-7B: 64 small experts, 8 a token, dropless (Muennighoff et al. 2024, 2409.02060).

    moejax plan experiments/pods/olmoe_1b_7b.py --topology=v5p:4x4x4
    moejax train --config=experiments/pods/olmoe_1b_7b.py --workdir=gs://BUCKET/olmoe_1b_7b

Not as there: the data (theirs is OLMoE-Mix); decay falls on matrices only, theirs on everything;
the cosine ends with the run, theirs at 5 trillion tokens, with 100 billion more down to 0; weights
begin by fan-in, theirs with a deviation of .02. The vocabulary is padded from 50,280 as there.
"""

from ml_collections import ConfigDict

from moejax.config import default_config, router_config

TOPOLOGY = "v5p:4x4x4"


def get_config(scale: str = "full") -> ConfigDict:
    if scale != "full":
        raise ValueError(f"unknown scale {scale!r}; known: full")
    config = default_config()
    config.model.update(layers=16, dim=2048, heads=16, ffn=1024, qk_norm=True)
    config.model.update(dtype="bfloat16", remat="full", query_block=512)
    config.router = router_config("topk", k=8)
    config.moe.experts = 64
    config.balance.update(load_balance=0.01, router_z=0.001)
    config.data.update(name="c4", tokenizer="bpe:50304", sequence=4096, batch=1024)
    config.optimizer.update(learning_rate=4e-4, warmup=2_500)
    config.train.update(steps=1_220_000, log_every=100, eval_every=5_000, checkpoint_every=1_000)
    config.mesh.update(data=1, fsdp=64)
    return config
