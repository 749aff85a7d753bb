"""DeepSeekMoE: fine-grained and shared experts (Dai et al. 2024, 2401.06066).

    moejax compare experiments/deepseek_moe.py:smoke

The paper's Table 1 and its granularity: all sparse arms have the expert parameters of 8
feed-forward networks, in every layer, and drop nothing. Takes minutes on two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config
from moejax.reporting import (
    Claim,
    Difference,
    Quotient,
    Suite,
    all_of,
    contrast,
    falling,
    less,
    over,
)

PAPER = "Dai et al. 2024"


def get_config(scale: str = "smoke") -> ConfigDict:
    """The paper's own arm: 1 shared and 31 routed experts of a quarter's width."""
    config = base.many_arms(scale)
    config.router = router_config("deepseek_moe", k=7)
    total = 4 * config.moe.experts
    config.moe.update(experts=total - 1, shared=1, ffn=config.model.ffn // 4)
    config.balance.load_balance = 0.01
    config.train.eval_without = True
    return config


def get_suite(scale: str = "smoke") -> Suite:
    config = get_config(scale)
    networks, width = (config.moe.experts + 1) // 4, config.model.ffn

    def shared(share: int) -> dict[str, Any]:
        """One shared expert and the rest routed, each a share of a feed-forward network."""
        sizes = {"moe.experts": share * networks - 1, "moe.ffn": width // share}
        return {**sizes, "router.k": 2 * share - 1}

    coarse = {"moe.experts": networks, "moe.shared": 0, "moe.ffn": width}
    gshard = {
        **coarse,
        "router.name": "gshard_top2",
        "balance.load_balance": 0.0,
        "balance.load_balance_top1": 0.01,
    }
    twice = "two feed-forward networks a token, as in the paper; dense, hash and Switch have one"
    return Suite(
        name="deepseek_moe",
        scale=scale,
        question="Do finer experts and a shared one help at equal total and active parameters?",
        variants={
            "dense": {"moe.experts": 0},
            "hash": {**coarse, "router.name": "hash", "balance.load_balance": 0.0},
            "switch": {**coarse, "router.name": "switch"},
            "gshard": gshard,
            "gshard_1.5": {**gshard, "moe.ffn": 3 * width // 2},
            "shared_1": shared(1),
            "shared_2": shared(2),
            "deepseek": {},
        },
        descriptions={
            "dense": "one feed-forward network a layer",
            "hash": f"a table from token to one of {networks} experts",
            "switch": f"top-1 of {networks}, dropless",
            "gshard": f"top-2 of {networks}, dropless",
            "gshard_1.5": "the same, experts half as wide again",
            "shared_1": "1 shared and top-1 of the rest, full width",
            "shared_2": "1 shared and top-3, half the width",
            "deepseek": "1 shared and top-7, a quarter of the width",
        },
        matched="text and its order, steps, batch; total expert parameters of all "
        "sparse arms but gshard_1.5; active ones of gshard and the arms with a shared expert",
        unmatched={
            **dict.fromkeys(("gshard", "shared_1", "shared_2", "deepseek"), twice),
            "gshard_1.5": "three feed-forward networks a token, by intent",
        },
        limits=base.limits(
            scale,
            "where the shared expert is taken away, the paper activates one more routed one, this "
            "suite does not",
        ),
        claims=claims(),
    )


def claims() -> tuple[Claim, ...]:
    best = "eval.bpb"
    table = f"{PAPER}, Table 1"
    sides = {"deepseek": 1, "gshard_1.5": -1}
    sparse = ("hash", "switch", "gshard", "deepseek")
    links = (
        ("deepseek", "gshard", "1.808 against 1.867"),
        ("gshard", "switch", "1.867 against 1.881"),
        ("switch", "hash", "1.881 against 1.932"),
    )
    return (
        Claim(
            "DM1",
            "Each sparse model is better than dense",
            table,
            "S",
            all_of(*(less(best, arm, "dense") for arm in sparse)),
        ),
        *(
            Claim(f"DM2-{a}", f"{a} is better than {b}", f"{table}: {told}", "D", less(best, a, b))
            for a, b, told in links
        ),
        Claim(
            "DM2-1.5",
            "deepseek is as good as GShard with experts half as wide again",
            f"{PAPER}: 1.808 and 1.808",
            "R",
            less(best, "deepseek", "gshard_1.5"),
        ),
        # Ten times the margin of "no worse", which is 0.5 %.
        Claim(
            "DM3",
            "Without its shared expert deepseek is worse by more than 5 %",
            f"{PAPER}, section 4.5: 2.414 against 1.808",
            "S",
            over(Quotient("eval.without.shared", best), "deepseek", 1.05),
        ),
        Claim(
            "DM4",
            "Finer experts are better, beside a shared one",
            PAPER,
            "D",
            falling(best, "shared_1", "shared_2", "deepseek"),
        ),
        Claim(
            "DM5",
            "Without each token's best experts, 1/8 or 1/4 of all, deepseek loses more than GShard "
            "with experts half as wide again",
            f"{PAPER}, section 4.5",
            "D",
            all_of(*(contrast(lost(share), sides) for share in (0.125, 0.25))),
        ),
    )


def lost(share: float) -> Difference:
    """Bits per byte that the best experts are worth, this share of them."""
    return Difference(f"eval.without.best_{share:g}", "eval.bpb")
