"""The common model at each scale. Experiments start from here and change what they are about.

smoke: minutes on two CPU cores. small: one accelerator, or hours on a CPU. The papers' sizes are in
pods/ where they exist.
"""

from ml_collections import ConfigDict

from moejax.config import default_config

SCALES = ("smoke", "small")


def get_config(scale: str = "smoke") -> ConfigDict:
    """The base: 8 SwiGLU experts of the dense network's width in every layer, top-2, dropless."""
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; known: {', '.join(SCALES)}")
    config = default_config()
    config.optimizer.warmup = 20
    if scale == "smoke":
        config.model.update(layers=2, dim=64, heads=2, ffn=128)
        config.data.update(sequence=64, batch=32)
        config.optimizer.learning_rate = 6e-3
        config.train.update(steps=250, log_every=10, eval_every=50, checkpoint_every=125)
    else:
        config.model.update(layers=6, dim=256, heads=8, ffn=1024, dtype="bfloat16")
        config.data.update(name="text", sequence=256, batch=64)
        config.moe.experts = 16
        config.optimizer.update(learning_rate=1e-3, warmup=250)
        config.train.update(steps=5000, log_every=50, eval_every=500, checkpoint_every=500)
    return config


def many_arms(scale: str = "smoke") -> ConfigDict:
    """The base of suites with a dozen arms or more: at smoke half the batch and half the steps."""
    config = get_config(scale)
    if scale == "smoke":
        config.data.batch = 16
        config.optimizer.warmup = 10
        config.train.update(steps=120, eval_every=40, checkpoint_every=120)
    return config


def limits(scale: str, more: str = "") -> str:
    """What a scale can and cannot show, for a suite of `many_arms`."""
    if scale == "smoke":
        size = (
            "0.12 million tokens an arm show that everything runs, and gross effects (drops, "
            "leaks, collapse); differences of loss between learned routers, 0.005 to 0.06 nats in "
            "the papers, need about a hundred times as many"
        )
    else:
        size = (
            "82 million tokens an arm order dense and sparse models; between learned routers "
            "of equal size a seed's spread is still as large as most published differences"
        )
    return f"{size}{'; ' if more else ''}{more}"
