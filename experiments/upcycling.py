"""Sparse upcycling: experts that begin as copies of a dense run (Komatsuzaki et al. 2022,
2212.05055).

    moejax compare experiments/upcycling.py:smoke

A dense run of n steps; from it, and beside it, runs of 20 % and 100 % of n more. The dense run that
goes on is a longer one of its own, so its schedule is its own too. Takes minutes on two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config
from moejax.reporting import Claim, Suite, less, similar

PAPER = "Komatsuzaki et al. 2022"


def get_config(scale: str = "smoke") -> ConfigDict:
    """Experts as wide as the dense network, all weights of a token summing to 1, dropless."""
    config = base.many_arms(scale)
    config.router = router_config("topk", k=2, renormalise=True)
    config.balance.load_balance = 0.01
    return config


def get_suite(scale: str = "smoke") -> Suite:
    steps, warmup = get_config(scale).train.steps, get_config(scale).optimizer.warmup

    def more(share: float, **changes: Any) -> dict[str, Any]:
        own = {"train.steps": round(share * steps), "optimizer.warmup": round(share * warmup)}
        return {**own, **changes}

    start = {"train.upcycle": "dense"}
    # One step at a rate that changes nothing: the model as it starts.
    still = {**start, "train.steps": 1, "optimizer.warmup": 0, "optimizer.learning_rate": 1e-12}
    twice = "two feed-forward networks a token"
    return Suite(
        name="upcycling",
        scale=scale,
        question="Is a dense run's loss kept, and for how long does the head start last?",
        variants={
            "dense": {"moe.experts": 0},
            "dense_120": {"moe.experts": 0, **more(1.2)},
            "start": still,
            "start_raw": {**still, "router.renormalise": False},
            "upcycled_20": {**start, **more(0.2)},
            "scratch_20": more(0.2),
            "upcycled_100": {**start, **more(1.0)},
            "scratch_100": more(1.0),
        },
        descriptions={
            "dense": f"{steps} steps",
            "dense_120": f"{round(1.2 * steps)} steps",
            "start": "dense upcycled to top-2 renormalised, before any step",
            "start_raw": "dense upcycled to top-2 with raw weights, before any step",
            "upcycled_20": f"start and {round(0.2 * steps)} steps",
            "scratch_20": f"the same model from random weights, {round(0.2 * steps)} steps",
            "upcycled_100": f"start and {steps} steps",
            "scratch_100": f"the same model from random weights, {steps} steps",
        },
        matched="text and its order (every run reads it from its beginning), batch; "
        "steps within each pair of upcycled and scratch",
        unmatched={
            "dense_120": "a fifth more steps",
            "start": f"no training, {twice}",
            "start_raw": f"no training, {twice}",
            "upcycled_20": f"a fifth of the steps after the dense run's, {twice}",
            "scratch_20": f"a fifth of the steps, {twice}",
            "upcycled_100": f"the dense run's steps and as many more, {twice}",
            "scratch_100": twice,
        },
        limits=base.limits(scale, "an upcycled run reads again what its dense run read"),
        claims=claims(),
    )


def claims() -> tuple[Claim, ...]:
    best = "eval.bpb"
    return (
        Claim(
            "UP1",
            "With weights that sum to 1 the upcycled model starts at the dense loss",
            PAPER,
            "S",
            similar(best, "start", "dense", 1e-4),
        ),
        Claim(
            "UP1-raw",
            "With raw weights the loss jumps",
            PAPER,
            "S",
            less(best, "dense", "start_raw"),
        ),
        Claim(
            "UP2",
            "After 20 % more steps upcycled is better than from scratch",
            PAPER,
            "S",
            less(best, "upcycled_20", "scratch_20"),
        ),
        Claim(
            "UP2-dense",
            "... and better than the dense run that goes on",
            PAPER,
            "D",
            less(best, "upcycled_20", "dense_120"),
        ),
        Claim(
            "UP3",
            "After 100 % from scratch has overtaken",
            f"{PAPER}; OLMoE, 2409.02060",
            "D",
            less(best, "scratch_100", "upcycled_100"),
        ),
    )
