"""DeepSeekMoE 16B: 64 fine experts and 2 shared ones (Dai et al. 2024, 2401.06066).

    moejax plan experiments/pods/deepseek_moe_16b.py --topology=v6e:16x16
    moejax train --config=experiments/pods/deepseek_moe_16b.py --workdir=gs://BUCKET/deepseek_moe

Not as there: the data (theirs is in-house); the rate falls in a line to a tenth over the last fifth
of the run, where theirs falls to .316 of itself at 80 % and again at 90 %; weights begin by fan-in,
theirs with a deviation of .006; a device takes twice its fair share of rows, what goes beyond
drops.
"""

from ml_collections import ConfigDict

from moejax.config import default_config, router_config

TOPOLOGY = "v6e:16x16"


def get_config(scale: str = "full") -> ConfigDict:
    if scale != "full":
        raise ValueError(f"unknown scale {scale!r}; known: full")
    config = default_config()
    config.model.update(layers=28, dim=2048, heads=16, ffn=10944, dtype="bfloat16", remat="full")
    config.router = router_config("deepseek_moe", k=6)
    config.moe.update(experts=64, ffn=1408, shared=2, first_dense=1, buffer_factor=2.0)
    config.balance.load_balance = 0.001
    config.data.update(name="c4", tokenizer="bpe:102400", sequence=4096, batch=4608)
    config.optimizer.update(learning_rate=4.2e-4, schedule="wsd", warmup=2_000)
    config.train.update(steps=106_449, log_every=100, eval_every=5_000, checkpoint_every=1_000)
    config.train.accumulation = 18
    config.mesh.update(data=1, fsdp=32, expert=8)
    return config
