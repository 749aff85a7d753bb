"""Expert choice where it is legitimate: masked tokens, seen from both sides (Zhou et al. 2022,
2202.09368).

    moejax compare experiments/masked.py:smoke

A pool of tokens gives nothing away where every token may look at every other. So here expert choice
meets token choice on equal terms, with as many slots in all experts together; and so does
batch-prioritised routing (Riquelme et al. 2021, 2106.05974; Zoph et al. 2022, 2202.08906), which
in a decoder sees later tokens too. A seventh of the bytes is masked; losses are bits per masked
byte. An arm takes half a minute on two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config
from moejax.reporting import Claim, Suite, all_of, less, similar, sooner, under

PAPER, PRIORITY = "Zhou et al. 2022", "Zoph et al. 2022"
FACTORS = ("0.5", "1.25")


def get_config(scale: str = "smoke") -> ConfigDict:
    """The paper's own arm: each expert takes its best tokens, 2 experts a token on average."""
    config = base.many_arms(scale)
    config.data.mask_rate = 0.15
    config.router = router_config("expert_choice", k=2)
    config.moe.update(experts=2 * config.moe.experts, ffn=config.model.ffn // 2)
    config.moe.update(dispatch="gather", capacity_factor=1.0)
    if scale == "smoke":  # a seventh of the targets that a decoder has
        config.train.update(steps=500, eval_every=100, checkpoint_every=500)
    return config


def get_suite(scale: str = "smoke") -> Suite:
    config = get_config(scale)
    coarse = {"moe.experts": config.moe.experts // 2, "moe.ffn": config.model.ffn}
    top1: dict[str, Any] = {**coarse, "router.name": "topk", "router.k": 1}
    top1 |= {"balance.load_balance": 0.01}
    in_place = {f"in_place_{cf}": {**top1, "moe.capacity_factor": float(cf)} for cf in FACTORS}
    best = {
        f"best_{cf}": {**top1, "moe.capacity_factor": float(cf), "router.order": "bpr"}
        for cf in FACTORS
    }
    return Suite(
        name="masked",
        scale=scale,
        question="Is expert choice better than token choice where no token may not be seen?",
        variants={
            "dense": {"moe.experts": 0},
            "switch": {**coarse, "router.name": "switch", "balance.load_balance": 0.01},
            "top2": {"router.name": "gshard_top2", "balance.load_balance_top1": 0.01},
            "pool_1": {**coarse, "router.k": 1},
            "pool": {},
            **in_place,
            **best,
        },
        descriptions={
            "dense": "one feed-forward network a layer",
            "switch": "top-1 of half as many experts twice as wide, capacity 1.0",
            "top2": "GShard's top-2, capacity 1.0",
            "pool_1": "experts choose, 1 a token on average, of half as many twice as wide",
            "pool": "each expert takes its best tokens of the batch, 2 experts a token on average",
            **{
                name: f"top-1, capacity {cf}; a full expert has served the first in the batch"
                for name, cf in zip(in_place, FACTORS, strict=True)
            },
            **{
                name: f"top-1, capacity {cf}; a full expert has served the most certain"
                for name, cf in zip(best, FACTORS, strict=True)
            },
        },
        matched="text, its order and its masked bytes, steps, batch, active "
        "parameters; slots of all experts together: of dense, Switch, top-2 and both pools",
        limits=_limits(scale),
        claims=claims(),
    )


def _limits(scale: str) -> str:
    if scale == "smoke":
        return (
            "0.5 million tokens an arm, of which 77,000 are predicted, show gross effects; the "
            "paper's tasks are GLUE and SuperGLUE, after pre-training of 100 million parameters"
        )
    return base.limits(scale, "a seventh of the tokens is predicted; the paper's tasks are others")


def claims() -> tuple[Claim, ...]:
    best = "eval.bpb"
    return (
        Claim(
            "EC1",
            "Expert choice is better than top-2 at equal slots",
            f"{PAPER}: 84.0 against 82.2 on other tasks",
            "D",
            less(best, "pool", "top2"),
        ),
        Claim(
            "EC1-1",
            "With 1 expert a token, it is better than Switch",
            f"{PAPER}, on other tasks",
            "D",
            less(best, "pool_1", "switch"),
        ),
        Claim(
            "EC1-dense",
            "Expert choice is better than dense",
            f"{PAPER}: 92.6 against 89.2, on other tasks",
            "S",
            less(best, "pool", "dense"),
        ),
        Claim(
            "EC1-steps",
            "It reaches dense's loss in fewer steps than top-2",
            f"{PAPER}: top-2's loss in half the steps",
            "D",
            sooner("pool", "top2", "dense"),
        ),
        Claim(
            "EC2",
            "Load is balanced exactly",
            PAPER,
            "S",
            all_of(*(under("eval.max_vio_global", arm, 1e-6) for arm in ("pool", "pool_1"))),
        ),
        Claim(
            "ST5",
            "Where experts are full, serving the most certain tokens first is better",
            f"{PRIORITY}, Table 8: -1.409 against -1.428 at factor 0.75",
            "D",
            less(best, "best_0.5", "in_place_0.5"),
        ),
        Claim(
            "ST5-wide",
            "... and makes no difference where they are not",
            f"{PRIORITY}, Table 8: -1.376 against -1.378",
            "D",
            similar(best, "best_1.25", "in_place_1.25"),
        ),
    )
