"""DeepSeek-V3 671B: 256 fine experts balanced by a bias (DeepSeek-AI 2024, 2412.19437).

    moejax plan experiments/pods/deepseek_v3.py --topology=v5p:8x8x16
    moejax train --config=experiments/pods/deepseek_v3.py --workdir=gs://BUCKET/deepseek_v3

Multi-token prediction is left out, as the published 671 billion parameters leave its module out.
Not as there: the data (theirs is in-house); the batch is 15,360 from the start, theirs grows to
that from 3,072; the rate is constant for two thirds of the run and falls in a line to a tenth,
theirs in a cosine, to .033 at the very end; the bias keeps moving in the last 500 billion tokens;
bfloat16 for FP8; weights begin by fan-in, theirs with a deviation of .006; a device takes twice its
fair share of rows, what goes beyond drops.
"""

from ml_collections import ConfigDict

from moejax.config import default_config, router_config

TOPOLOGY = "v5p:8x8x16"


def get_config(scale: str = "full") -> ConfigDict:
    if scale != "full":
        raise ValueError(f"unknown scale {scale!r}; known: full")
    config = default_config()
    config.model.update(layers=61, dim=7168, heads=128, head_dim=128, ffn=18432)
    config.model.update(attention="latent", q_rank=1536, kv_rank=512, rope_dim=64)
    config.model.update(dtype="bfloat16", remat="full", query_block=512)
    config.router = router_config(
        "deepseek_v3", k=8, expert_groups=8, top_groups=4, route_scale=2.5, bias_rate=1e-3
    )
    config.moe.update(experts=256, ffn=2048, shared=1, first_dense=3, buffer_factor=2.0)
    config.balance.load_balance_sequence = 1e-4
    config.data.update(name="c4", tokenizer="bpe:129280", sequence=4096, batch=15_360)
    config.optimizer.update(learning_rate=2.2e-4, schedule="wsd", decay_fraction=0.32)
    config.optimizer.warmup = 2_000
    config.train.update(steps=235_000, log_every=100, eval_every=5_000, checkpoint_every=1_000)
    config.train.accumulation = 5
    config.mesh.update(data=1, fsdp=128, expert=8)
    return config
