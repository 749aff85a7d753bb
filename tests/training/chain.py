"""A comparison whose runs build on each other: a dense one, one with experts made from it that
records its routing, and one that follows it. The scale is the output folder."""

from ml_collections import ConfigDict

from moejax.config import default_config, override
from moejax.reporting import Suite
from tests.tiny import SIZES


def get_config(scale: str = "") -> ConfigDict:
    every = {"train.steps": 4, "train.log_every": 1, "train.eval_every": 0}
    return override(default_config(), {**SIZES, **every, "mesh.expert": 2})


def get_suite(scale: str) -> Suite:
    variants = {
        "dense": {"moe.experts": 0},
        "sparse": {
            "router.name": "topk",
            "train.upcycle": f"{scale}/dense/seed0",
            "train.trace_every": 1,
        },
        "follower": {"router.name": "replay", "train.replay": f"{scale}/sparse/seed0"},
    }
    return Suite("chain", "Does each run find what it needs?", scale, variants, seeds=(0,))
