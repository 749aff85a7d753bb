"""A balance loss over the global batch, or over less (Qiu et al. 2025, 2501.11873)?

    moejax compare experiments/global_balance.py:smoke

The loss asks for equal loads: of every sequence, or of the batch, where a sequence may keep to its
own experts. Takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config
from moejax.reporting import Claim, Difference, Suite, all_of, contrast, less, positive

PAPER = "Qiu et al. 2025"


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.many_arms(scale)
    config.router = router_config("topk", k=2)
    config.moe.update(experts=2 * config.moe.experts, ffn=config.model.ffn // 2)
    return config


def get_suite(scale: str = "smoke") -> Suite:
    weight, domains = 0.008, "eval.specialisation"
    steps = get_config(scale).train.steps
    return Suite(
        name="global_balance",
        scale=scale,
        question="Over how many tokens should loads be balanced?",
        variants={
            "none": {},
            "sequence": {"balance.load_balance_sequence": weight},
            "batch": {"balance.load_balance": weight},
            "free": {"router.name": "loss_free", "router.k": 2, "router.bias_rate": 1 / steps},
        },
        descriptions={
            "none": "nothing balances",
            "sequence": f"a balance loss of {weight} per sequence",
            "batch": f"a balance loss of {weight} over the batch",
            "free": "a bias, and a sigmoid gate",
        },
        baseline="sequence",
        matched="everything but what balances; the arm `free` also has another gate",
        limits=base.limits(
            scale,
            "not measured: losses over a few sequences or over shuffled tokens; the text has two "
            "domains",
        ),
        claims=(
            Claim(
                "GM1",
                "Balance over the batch is better than over each sequence",
                f"{PAPER}: a perplexity of 8.038 against 8.167",
                "D",
                less("eval.bpb", "batch", "sequence"),
            ),
            Claim(
                "GM1-free",
                "... and better than a bias",
                f"{PAPER}: 8.038 against 8.080",
                "D",
                less("eval.bpb", "batch", "free"),
            ),
            Claim(
                "GM2",
                "Experts divide the domains more than chance, and more than balanced by sequence",
                PAPER,
                "S",
                all_of(
                    positive(Difference(domains, f"{domains}_floor"), "batch"),
                    contrast(domains, {"batch": 1.0, "sequence": -1.0}),
                ),
            ),
            Claim(
                "GM3",
                "Loads of the evaluation set are no worse balanced",
                "no source: what such a comparison must show beside it",
                "R",
                less("eval.max_vio_global", "batch", "sequence"),
            ),
        ),
    )
