"""GShard: top-2 with a random second expert (Lepikhin et al. 2020, 2006.16668).

    moejax train --config=experiments/gshard.py:smoke --workdir=/tmp/gshard
    moejax compare experiments/gshard.py:smoke

Experts are half as wide as the dense network's feed-forward layer, so that two of them are its
active size, however many there are. The comparison is the paper's Figure 1 and section 4: more
experts at fixed compute. Takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config
from moejax.reporting import (
    Claim,
    Difference,
    Suite,
    all_of,
    contrast,
    falling,
    less,
    positive,
    similar,
    sooner,
)

PAPER = "Lepikhin et al. 2020"


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.many_arms(scale)
    config.router = router_config("gshard_top2")
    config.moe.update(experts=2 * config.moe.experts, ffn=config.model.ffn // 2)
    config.moe.update(dispatch="gather", capacity_factor=1.0, eval_capacity_factor=2.0)
    config.balance.load_balance_top1 = 0.01
    steps = config.train.steps  # the curves are read for steps to a loss
    config.train.update(eval_every=steps // 12, log_every=max(5, steps // 120))
    return config


def get_suite(scale: str = "smoke") -> Suite:
    counts = (2, 4, 8, 16) if scale == "smoke" else (2, 4, 8, 16, 32, 64)
    sizes = {f"e{e}": {"moe.experts": e} for e in counts}
    return Suite(
        name="gshard",
        scale=scale,
        question="Do more experts help at fixed compute, and what does the second choice cost?",
        variants={
            "dense": {"moe.experts": 0},
            **sizes,
            "e16_always": {**sizes["e16"], "router.second": "always"},
        },
        descriptions={
            "dense": "one feed-forward network a layer",
            **{name: f"top-2 of {name[1:]}, random second, capacity 1.0" for name in sizes},
            "e16_always": "e16, but the second expert is always asked for",
        },
        matched="text and its order, steps, batch, active parameters and FLOPs; "
        "total parameters grow with the experts, by intent",
        limits=base.limits(
            scale,
            "the paper goes from 128 to 2,048 experts on 13 billion sentence pairs; tokens to a "
            "loss are not monotone there where the batch changes too, so that is not claimed",
        ),
        claims=claims([f"e{e}" for e in counts]),
    )


def claims(arms: list[str]) -> tuple[Claim, ...]:
    best, most, few = "eval.bpb", arms[-1], arms[-3]
    doublings = zip(arms[:-2], arms[1:-1], arms[2:], strict=True)
    return (
        Claim(
            "GS1",
            f"Each doubling of the experts is no worse, {most} is better than {arms[0]}",
            f"{PAPER}: BLEU 36.7, 40.0, 41.3 with 128, 512, 2,048 experts",
            "S",
            falling(best, *arms),
        ),
        Claim(
            "GS1-dense",
            f"{most} is better than {few}, and {few} than dense",
            f"{PAPER}: BLEU 44.3 against 36.9",
            "S",
            all_of(less(best, most, few), less(best, few, "dense")),
        ),
        Claim(
            "GS2",
            "Each doubling gains less than the one before",
            f"{PAPER}: BLEU +3.3, then +1.3",
            "D",
            all_of(*(contrast(best, {a: 1.0, b: -2.0, c: 1.0}) for a, b, c in doublings)),
        ),
        Claim(
            "GS3",
            "More experts need fewer steps to the dense model's final loss",
            f"{PAPER}: 995 and 141 billion tokens with 128 and 512",
            "S",
            all_of(sooner(most, few, "dense"), sooner(few, "dense", "dense")),
        ),
        Claim(
            "GS4",
            "At capacity factor 1 second choices are dropped more often than first ones",
            f"{PAPER}, algorithm 1: first choices are served first",
            "S",
            positive(Difference("train.drop_k.1", "train.drop_k.0"), "e16_always"),
        ),
        Claim(
            "GS5",
            "A random second choice is as good as one that is always made",
            f"{PAPER}, algorithm 1",
            "D",
            similar(best, "e16", "e16_always"),
        ),
    )
