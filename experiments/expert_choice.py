"""Expert choice: experts pick tokens (Zhou et al. 2022, 2202.09368).

    moejax train --config=experiments/expert_choice.py:smoke --workdir=/tmp/expert_choice
    moejax compare experiments/expert_choice.py:smoke

Trained on the pool of the whole batch, which lets a decoder see the future; evaluated causally,
where only tokens at one position of different sequences compete. The difference of the two is the
leak (Wang et al. 2024, 2408.15664, section 5.2). Takes minutes on two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config
from moejax.reporting import (
    Claim,
    Either,
    Suite,
    all_of,
    less,
    positive,
    ratio_at_least,
    sees_later,
    similar,
    under,
)

PAPER, LEAK = "Zhou et al. 2022", "Wang et al. 2024, section 5.2"


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.many_arms(scale)
    config.router = router_config("expert_choice", k=2)
    config.moe.update(experts=2 * config.moe.experts, ffn=config.model.ffn // 2)
    config.moe.update(dispatch="gather", capacity_factor=1.0, eval_groups="position")
    return config


def get_suite(scale: str = "smoke") -> Suite:
    config = get_config(scale)
    coarse = {"moe.experts": config.moe.experts // 2, "moe.ffn": config.model.ffn}
    hashed = {**coarse, "moe.dispatch": "dropless", "moe.capacity_factor": None}
    # Token choice is evaluated as it was trained.
    token: dict[str, Any] = {"moe.eval_groups": ""}
    switch = {**coarse, **token, "router.name": "switch", "balance.load_balance": 0.01}
    top2 = {**token, "router.name": "gshard_top2", "balance.load_balance_top1": 0.01}
    capped = {"router.name": "expert_choice_capped"}
    return Suite(
        name="expert_choice",
        scale=scale,
        question="Is expert choice better than token choice, and how much of it is a leak?",
        variants={
            "dense": {"moe.experts": 0, **token},
            "switch": switch,
            "top2": top2,
            "pool": {},
            "pool_1": {**coarse, "router.k": 1},
            "sequence": {"moe.groups": "sequence"},
            "position": {"moe.groups": "position"},
            "capped_2": {**capped, "router.most": 2},
            "capped_3": {**capped, "router.most": 3},
            "hash": {**hashed, **token, "router.name": "hash"},
            "oracle": {**hashed, **token, "router.name": "hash", "router.look": "next"},
        },
        descriptions={
            "dense": "one feed-forward network a layer",
            "switch": "top-1 of half as many experts twice as wide, capacity 1.0",
            "top2": "GShard's top-2, capacity 1.0",
            "pool": "each expert takes its best tokens of the batch, 2 experts a token on average",
            "pool_1": "the same, 1 expert a token, of half as many twice as wide",
            "sequence": "pools of one sequence",
            "position": "pools of one position of all sequences: causal",
            "capped_2": "pool, at most 2 experts a token",
            "capped_3": "pool, at most 3 experts a token",
            "hash": "a table from token to expert",
            "oracle": "a table from the *next* token to expert: a control that cheats",
        },
        matched="text and its order, steps, batch, active parameters, slots of all "
        "experts together",
        limits=base.limits(
            scale,
            "a decoder is where expert choice is not legitimate unless it is causal; where it is, "
            "with masked tokens, it is judged in masked.py",
        ),
        claims=claims(),
    )


def claims() -> tuple[Claim, ...]:
    best, pooled, vio = "eval.bpb", "eval.bpb_as_trained", "eval.max_vio_global"
    return (
        Claim(
            "EC1",
            "Expert choice, causal, is better than top-2 at equal slots",
            f"{PAPER}: 84.0 against 82.2 on other tasks",
            "D",
            less(best, "position", "top2"),
        ),
        Claim(
            "EC1-1",
            "With 1 expert a token, expert choice (causal in evaluation) is better than Switch",
            f"{PAPER}, on other tasks",
            "D",
            less(best, "pool_1", "switch"),
        ),
        Claim(
            "EC2",
            "Load is balanced exactly",
            PAPER,
            "S",
            all_of(*(under(vio, arm, 1e-6) for arm in ("pool", "sequence", "position"))),
        ),
        Claim(
            "EC3",
            "At most 3 experts a token are as good as any number (pooled)",
            f"{PAPER}: 84.0 and 84.0",
            "D",
            similar(pooled, "capped_3", "pool"),
        ),
        Claim(
            "EC3-2",
            "At most 3 are better than at most 2 (pooled)",
            f"{PAPER}: 84.0 against 83.2",
            "D",
            less(pooled, "capped_3", "capped_2"),
        ),
        Claim(
            "EC4",
            "Pools of a batch or a sequence see later tokens, and so does top-2 whose first "
            "choices are served first; one position, top-1 and hashing do not",
            LEAK,
            "S",
            sees_later(
                yes=("pool", "pool_1", "sequence", "capped_2", "capped_3", "top2", "oracle"),
                no=("position", "switch", "hash"),
            ),
        ),
        Claim(
            "EC5",
            "Trained on a pool, it loses when it is evaluated causally: the leak",
            LEAK,
            "S",
            all_of(positive("eval.leak", "pool"), positive("eval.leak", "sequence")),
        ),
        Claim(
            "EC6",
            "A pool of one sequence leaks more than one of the batch (pooled loss)",
            f"{LEAK}: smaller pools have a lower loss",
            "D",
            less(pooled, "sequence", "pool"),
        ),
        Claim(
            "EC6-mixed",
            "A pool of one token of each sequence, which cannot leak, has no such low loss",
            f"{LEAK}: gone after shuffling",
            "D",
            less(Either(pooled, best), "sequence", "position"),
        ),
        Claim(
            "EC7",
            "An expert that knows the next token is caught, and its loss is absurd",
            f"{LEAK}: a perplexity of 1.97",
            "S",
            all_of(
                sees_later(yes=("oracle",), no=("hash",)),
                ratio_at_least(best, "hash", "oracle", 1.2),
            ),
        ),
    )
