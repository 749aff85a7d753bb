"""Scaling signs: how the gain of experts moves with size, tokens and learning rate (Clark et al.
2022, 2202.01169; Krajewski et al. 2024, 2402.07871; Ludziejewski et al. 2025, 2502.05172).

    moejax compare experiments/scaling.py:smoke

Signs only: no law is fitted to models of this size. Takes minutes on two CPU cores.
"""

from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config
from moejax.reporting import Claim, Difference, Run, Suite, all_of, contrast, falling

SIZES = {"half": 0.5, "one": 1.0, "double": 2.0}
EXPERTS = (0, 4, 16)


def get_config(scale: str = "smoke") -> ConfigDict:
    """Switch of 16 experts."""
    config = base.many_arms(scale)
    config.router = router_config("switch")
    config.moe.update(experts=16)
    config.balance.load_balance = 0.01
    return config


@dataclass(frozen=True)
class Halfway:
    """Bits per byte at the last evaluation in the first two thirds of training."""

    def __call__(self, run: Run) -> float | None:
        last = max((record["step"] for record in run.evals), default=0)
        early = [record for record in run.evals if record["step"] <= 2 * last / 3]
        return float(early[-1]["bpb"]) if early else None

    def __str__(self) -> str:
        return "bpb halfway"


def get_suite(scale: str = "smoke") -> Suite:
    config = get_config(scale)
    model, rate = config.model, config.optimizer.learning_rate

    def size(share: float) -> dict[str, Any]:
        names = ("dim", "ffn", "heads")
        return {f"model.{name}": max(1, int(share * getattr(model, name))) for name in names}

    grid = {
        f"{name}_e{experts}": {"moe.experts": experts, **size(share)}
        for name, share in SIZES.items()
        for experts in EXPERTS
    }
    rates = {
        f"one_e{experts}_x{factor:g}": {
            "moe.experts": experts,
            "optimizer.learning_rate": factor * rate,
        }
        for experts in (4, 16)
        for factor in (0.5, 2)
    }
    return Suite(
        name="scaling",
        scale=scale,
        question="Where do experts help most: small or large models, few or many tokens?",
        variants={**grid, **rates},
        descriptions={
            **{
                f"{name}_e{e}": f"{share:g} times the width, {f'{e} experts' if e else 'dense'}"
                for name, share in SIZES.items()
                for e in EXPERTS
            },
            **{name: "{}, {} times the learning rate".format(*name.split("_x")) for name in rates},
        },
        baseline="one_e0",
        matched="text and its order, steps, batch; within a size also active parameters and "
        "learning rate",
        unmatched={
            **{name: "another width" for name in grid if not name.startswith("one_")},
            **{name: f"{name.split('_x')[1]} times the learning rate" for name in rates},
        },
        limits=base.limits(
            scale,
            "the best learning rate is judged by two points around one; granularity is in "
            "deepseek_moe",
        ),
        claims=claims(),
    )


def claims() -> tuple[Claim, ...]:
    best = "eval.bpb"
    smaller = {"half_e0": 1.0, "half_e16": -1.0, "double_e0": -1.0, "double_e16": 1.0}
    rates = {"one_e16_x2": 1.0, "one_e16_x0.5": -1.0, "one_e4_x2": -1.0, "one_e4_x0.5": 1.0}
    return (
        Claim(
            "SC1",
            "At each size the loss falls with the number of experts",
            "Clark et al. 2022",
            "S",
            all_of(*(falling(best, *(f"{size}_e{e}" for e in EXPERTS)) for size in SIZES)),
        ),
        Claim(
            "SC2",
            "At fixed tokens experts gain less in a larger model",
            "Clark et al. 2022",
            "D",
            contrast(best, smaller),
        ),
        Claim(
            "SC3",
            "At fixed size they gain more with more tokens",
            "Krajewski et al. 2024",
            "D",
            contrast(Difference(best, Halfway()), {"one_e0": 1.0, "one_e16": -1.0}),
        ),
        Claim(
            "SC4",
            "A doubled against a halved learning rate costs more with more experts",
            "Ludziejewski et al. 2025: the best learning rate falls with the experts",
            "D",
            contrast(best, rates),
        ),
    )
