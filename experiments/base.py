"""The common model at each scale. Experiments start from here and change what they are about.

smoke: half a minute an arm and seed on two CPU cores, most of it compilation. small: 18 TFLOP and
two minutes on two CPU cores (a core each for two runs at once); so `gshard` (24 runs) takes fifty
minutes, `expert_choice` (33) and `loss_free` (36) over an hour, `switch` (51) over two.
14 processes that shared an H100 trained 49 such runs in six and a half minutes, most of it
compilation. medium: the model of small for 4,000 steps of fewer tokens, 30 TFLOP: seven minutes an
arm and seed on one CPU core. large: 3 PFLOP, the first fifteen million tokens of a wide model: half
a minute for one seed on an H100. The papers' sizes are in pods/ where they exist.

A comparison may take more than a sitting. What is finished is kept, and it goes on from a
committed report alone:

    moejax compare experiments/switch.py:small                 # until it is cut
    moejax report runs/switch/small --to=experiments/results/switch/small
    moejax compare experiments/switch.py:small --have=experiments/results/switch/small
"""

from ml_collections import ConfigDict

from moejax.config import default_config

SCALES = ("smoke", "small", "medium", "large")


def get_config(scale: str = "smoke") -> ConfigDict:
    """The base: 8 SwiGLU experts of the dense network's width in every layer, top-2, dropless.
    Active parameters of a dense model: 0.12, 1.1, 1.1 and 34 million."""
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; known: {', '.join(SCALES)}")
    config = default_config()
    if scale == "smoke":
        config.model.update(layers=2, dim=64, heads=2, ffn=128)
        config.data.update(sequence=64, batch=32)
        config.optimizer.update(learning_rate=6e-3, warmup=20)
        config.train.update(steps=250, log_every=10, eval_every=50, checkpoint_every=125)
    elif scale in ("small", "medium"):
        config.model.update(layers=4, dim=128, heads=4, ffn=512)
        config.data.update(name="text", sequence=128, batch=32)
        config.optimizer.update(learning_rate=3e-3, warmup=50)
        config.train.update(steps=600, log_every=10, eval_every=100, checkpoint_every=200)
        config.train.eval_rows = 512
        if scale == "medium":
            config.data.batch = 8
            config.optimizer.update(learning_rate=1.5e-3, warmup=200)
            config.train.update(steps=4000, log_every=50, eval_every=500, checkpoint_every=1000)
    else:
        config.model.update(layers=8, dim=512, heads=8, ffn=2048, dtype="bfloat16")
        config.data.update(name="text", sequence=256, batch=64)
        config.optimizer.update(learning_rate=1e-3, warmup=90)
        config.train.update(steps=900, log_every=10, eval_every=150, checkpoint_every=450)
        config.train.eval_rows = 512
    return config


def bias_rate(scale: str) -> float:
    """Of routers that balance by a bias: so that it can move by about 1 in all steps."""
    return {"smoke": 1e-2, "small": 2e-3, "medium": 2.5e-4, "large": 2e-3}[scale]


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
    size = {
        "smoke": "0.12 million tokens an arm show that everything runs, and gross effects (drops, "
        "leaks, collapse); differences of loss between learned routers, 0.005 to 0.06 nats in "
        "the papers, need about a hundred times as many",
        "small": "2.5 million tokens an arm, in 600 steps, are the beginning of a training, where "
        "sparse models hardly part from dense ones; between learned routers of equal size a "
        "seed's spread is as large as most published differences",
        "medium": "4.1 million tokens an arm, in seven times the steps of small, are meant to part "
        "sparse models from dense ones; between learned routers of equal size a seed's spread is "
        "as large as most published differences",
        "large": "15 million tokens for 34 million active parameters are the beginning of a "
        "training; what a longer one would give is not shown",
    }[scale]
    return f"{size}{'; ' if more else ''}{more}"
