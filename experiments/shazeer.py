"""Noisy top-k: which balance loss (Shazeer et al. 2017, 1701.06538, Table 6)?

    moejax compare experiments/shazeer.py:smoke

One router, six pairs of weights for the losses `importance` and `load`. Loads are those of
training: evaluation has no noise, and the losses balance what the noise does too. Takes minutes on
two CPU cores.
"""

import math
from dataclasses import dataclass

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config
from moejax.reporting import Claim, Run, Suite, all_of, less, ratio_at_least, similar

PAPER = "Shazeer et al. 2017, Table 6"
# importance, load; perplexity, CV(load) and largest over mean load in the paper.
WEIGHTS = {
    "none": (0.0, 0.0, "39.8, 3.01, 17.80"),
    "importance": (0.2, 0.0, "35.6, .17, 1.47"),
    "load": (0.0, 0.2, "35.7, .04, 1.15"),
    "both": (0.1, 0.1, "35.6, .05, 1.14"),
    "both_weak": (0.01, 0.01, "35.7, .11, 1.37"),
    "both_strong": (1.0, 1.0, "35.7, .02, 1.07"),
}
MEASURED = 1e-12  # the weight of a loss that is measured, not felt


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.many_arms(scale)
    config.router = router_config("noisy_topk", k=4)
    config.moe.update(experts=4 * config.moe.experts, ffn=config.model.ffn // 4)
    config.balance.update(importance=0.1, load=0.1)
    return config


@dataclass(frozen=True)
class LargestLoad:
    """Largest over mean load of a training batch, mean of the layers and the last 10 %."""

    def __call__(self, run: Run) -> float | None:
        vio = run.value("train.max_vio")
        return None if vio is None else 1 + vio

    def __str__(self) -> str:
        return "largest / mean load"


@dataclass(frozen=True)
class VariationOfLoad:
    """CV(load) of a training batch: the root of the loss `load`, whose loads are expected values
    over the noise, as in the paper."""

    def __call__(self, run: Run) -> float | None:
        squared = run.value("train.balance.load")
        return None if squared is None else math.sqrt(squared)

    def __str__(self) -> str:
        return "CV(load)"


def get_suite(scale: str = "smoke") -> Suite:
    return Suite(
        name="shazeer",
        scale=scale,
        question="Which balance loss does noisy top-k routing need?",
        variants={
            name: {
                "balance.importance": max(importance, MEASURED),
                "balance.load": max(load, MEASURED),
            }
            for name, (importance, load, _) in WEIGHTS.items()
        },
        descriptions={
            name: f"importance {importance:g}, load {load:g} (paper: {told})"
            for name, (importance, load, told) in WEIGHTS.items()
        },
        baseline="none",
        matched="everything but the two weights",
        limits=base.limits(scale, "the paper has 256 experts between the layers of an LSTM"),
        claims=claims(),
    )


def claims() -> tuple[Claim, ...]:
    best = "eval.bpb"
    balanced = [name for name in WEIGHTS if name != "none"]
    largest, variation = LargestLoad(), VariationOfLoad()
    return (
        Claim(
            "SH1",
            "Without a balance loss the loss is the worst",
            f"{PAPER}: 39.8 against 35.7",
            "S",
            all_of(*(less(best, arm, "none") for arm in balanced)),
        ),
        Claim(
            "SH1-load",
            "... and the largest load more than twice that of every other arm",
            f"{PAPER}: 17.80 against 1.47",
            "S",
            all_of(*(ratio_at_least(largest, "none", arm, 2.0) for arm in balanced)),
        ),
        Claim(
            "SH2",
            "The load loss makes loads vary less than the importance loss alone",
            f"{PAPER}: .04 to .05 against .17",
            "S",
            all_of(*(less(variation, arm, "importance") for arm in ("load", "both"))),
        ),
        Claim(
            "SH3",
            "Among the balanced arms the loss is the same",
            f"{PAPER}: 35.6 to 35.7",
            "D",
            all_of(*(similar(best, arm, "both") for arm in balanced if arm != "both")),
        ),
    )
