"""Auxiliary-loss-free balancing: a bias instead of a loss (Wang et al. 2024, 2408.15664).

    moejax train --config=experiments/loss_free.py:smoke --workdir=/tmp/loss_free
    moejax compare experiments/loss_free.py:smoke

The comparison draws the frontier of loss against balance: the weight alpha of a balance loss on
one curve, the update rate of the bias on the other. |b| is at most rate x steps, and the paper's
1e-3 is for 40,000 steps: here the rate lets |b| reach 1. Takes minutes on two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config
from moejax.reporting import (
    Claim,
    Quotient,
    Suite,
    Window,
    all_of,
    at_most,
    falling,
    less,
    ratio_at_least,
    similar,
)

PAPER = "Wang et al. 2024"
ALPHAS = ("0.0001", "0.001", "0.01")


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.many_arms(scale)
    rate = base.bias_rate(scale)
    config.router = router_config("loss_free", k=2, bias_rate=rate)
    config.moe.update(experts=2 * config.moe.experts, ffn=config.model.ffn // 2)
    if scale == "smoke":
        config.train.update(eval_rows=1024, eval_every=60)  # 65,536 tokens: MaxVio needs them
    return config


def get_suite(scale: str = "smoke") -> Suite:
    rate = 1 / get_config(scale).train.steps
    sequence = "balance.load_balance_sequence"

    def bias(rate: float, **options: Any) -> dict[str, Any]:
        return {"router.bias_rate": rate, **{f"router.{k}": v for k, v in options.items()}}

    still = bias(0.0)  # a bias that stays 0: the same gate, balanced by a loss
    soft = {"score": "softmax", "rule": "proportional"}
    return Suite(
        name="loss_free",
        scale=scale,
        question="Does a bias balance better than a loss, and at what price?",
        variants={
            "none": still,
            **{f"aux_{alpha}": {**still, sequence: float(alpha)} for alpha in ALPHAS},
            "aux_batch": {**still, "balance.load_balance": 0.001},
            "free": bias(rate),
            "free_slow": bias(rate / 10),
            "free_fast": bias(10 * rate),
            "free_proportional": bias(rate, rule="proportional"),
            "free_multiplicative": bias(rate, rule="multiplicative"),
            "softmax_aux": {**bias(0.0, score="softmax"), sequence: 0.001},
            "softmax_free": bias(rate, **soft),
        },
        descriptions={
            "none": "nothing balances",
            **{f"aux_{alpha}": f"balance loss per sequence, alpha {alpha}" for alpha in ALPHAS},
            "aux_batch": "balance loss of the whole batch, alpha 0.001",
            "free": f"bias by the sign of the load's error, u = {rate:.2g}",
            "free_slow": "u / 10",
            "free_fast": "10 u",
            "free_proportional": "bias by the error itself",
            "free_multiplicative": "a factor instead of a bias",
            "softmax_aux": "softmax gate, balance loss per sequence, alpha 0.001",
            "softmax_free": "softmax gate, bias by the error itself",
        },
        baseline="aux_0.001",
        matched="text and its order, steps, batch, all sizes: the arms differ only "
        "in what balances (and two in the gate)",
        limits=base.limits(
            scale,
            "not measured: the specialisation of experts by domain; the MaxVio of 0.04 that the "
            "paper reports lies at the floor of 65,536 tokens",
        ),
        claims=claims(),
    )


def claims() -> tuple[Claim, ...]:
    best, vio, floor = "eval.bpb", "eval.max_vio_global", "eval.max_vio_floor"
    first, last = Window("max_vio", 0, 0.2), Window("max_vio", 0.8, 1)
    aux = "aux_0.001"
    return (
        Claim(
            "LF1",
            "The bias is no worse than the balance loss",
            f"{PAPER}, Table 2: a perplexity of 9.50 against 9.56",
            "S",
            at_most(best, "free", aux),
        ),
        Claim(
            "LF1-load",
            "... and its MaxVio is at most a third",
            f"{PAPER}, Table 2: .04 against .72",
            "S",
            ratio_at_least(vio, aux, "free", 3.0, floor),
        ),
        Claim("LF2", "It is better in loss", f"{PAPER}, Table 2", "D", less(best, "free", aux)),
        Claim(
            "LF3",
            "MaxVio falls as alpha grows from 0",
            PAPER,
            "S",
            falling(vio, "none", *(f"aux_{alpha}" for alpha in ALPHAS), margin=0.05),
        ),
        Claim(
            "LF3-loss",
            "An alpha of 0.01 costs loss against 0.001",
            PAPER,
            "D",
            less(best, "aux_0.001", "aux_0.01"),
        ),
        Claim(
            "LF4",
            "Too small a rate is the least balanced early, too large a rate late",
            PAPER,
            "S",
            all_of(
                less(first, "free", "free_slow"),
                less(first, "free_fast", "free_slow"),
                less(last, "free", "free_fast"),
                less(last, "free_slow", "free_fast"),
            ),
        ),
        *(
            Claim(
                f"LF5-{rule}",
                f"A {rule} rule is as good as the sign",
                f"{PAPER}: {told}",
                "D",
                similar(best, f"free_{rule}", "free"),
            )
            for rule, told in (
                ("proportional", "9.51 against 9.50"),
                ("multiplicative", "9.52 against 9.50"),
            )
        ),
        Claim(
            "LF6",
            "From a batch to the evaluation set MaxVio falls by more with the bias",
            PAPER,
            "S",
            less(Quotient(vio, "train.max_vio"), "free", aux),
        ),
        Claim(
            "LF7",
            "The bias is better than a balance loss of the whole batch",
            "Qiu et al. 2025, 2501.11873: no, a perplexity of 8.080 against 8.038",
            "R",
            less(best, "free", "aux_batch"),
        ),
        Claim(
            "LF8",
            "A balance loss of the whole batch is no worse than one per sequence, the bias the "
            "same as it",
            "DeepSeek-AI 2024, 2412.19437: 2.253, 2.258, 2.253",
            "D",
            all_of(at_most(best, "aux_batch", aux), similar(best, "free", "aux_batch")),
        ),
        Claim(
            "LF9",
            "With a softmax gate too the bias balances better",
            f"{PAPER}: .027 against .937",
            "S",
            ratio_at_least(vio, "softmax_aux", "softmax_free", 3.0, floor),
        ),
    )
