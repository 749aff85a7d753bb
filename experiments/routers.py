"""Four routers and a dense model: what do experts buy at equal active parameters, data and steps?

    moejax compare experiments/routers.py:smoke

Every arm has the same active parameters and, dense aside, the same total: Switch has E experts of
the dense width, the top-2 arms 2 E of half that width. Takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments import base
from moejax.reporting import Claim, Suite, less, positive, ratio_at_least


def get_config(scale: str = "smoke") -> ConfigDict:
    return base.get_config(scale)


def get_suite(scale: str = "smoke") -> Suite:
    config = base.get_config(scale)
    fine = {"moe.experts": 2 * config.moe.experts, "moe.ffn": config.model.ffn // 2}
    rate = base.bias_rate(scale)
    return Suite(
        name="routers",
        scale=scale,
        question="What do experts buy at equal active parameters, data and steps?",
        variants={
            "dense": {"moe.experts": 0},
            "switch": {
                "router.name": "switch",
                "moe.dispatch": "gather",
                "moe.capacity_factor": 1.25,
                "moe.eval_capacity_factor": 2.0,
                "moe.jitter": 0.01,
                "moe.router_scale": 0.1,
                "balance.load_balance": 0.01,
            },
            "gshard": {
                **fine,
                "router.name": "gshard_top2",
                "moe.dispatch": "gather",
                "moe.capacity_factor": 1.0,
                "moe.eval_capacity_factor": 2.0,
                "balance.load_balance_top1": 0.01,
            },
            "expert_choice": {
                **fine,
                "router.name": "expert_choice",
                "router.k": 2,
                "moe.dispatch": "gather",
                "moe.capacity_factor": 1.0,
                "moe.eval_groups": "position",
            },
            "loss_free": {
                **fine,
                "router.name": "loss_free",
                "router.k": 2,
                "router.bias_rate": rate,
            },
        },
        descriptions={
            "dense": "one feed-forward network a layer",
            "switch": "top-1, capacity 1.25, balance loss 0.01",
            "gshard": "top-2, random second expert, capacity 1.0, balance loss 0.01",
            "expert_choice": "experts take tokens of the whole batch; evaluated causally",
            "loss_free": "top-2 of sigmoid + bias, dropless, no balance loss",
        },
        seeds=(0, 1, 2),
        claims=(
            Claim(
                "R1",
                "Switch is better than dense at equal active parameters",
                "Fedus et al. 2021, Table 1",
                "S",
                less("eval.bpb", "switch", "dense"),
            ),
            Claim(
                "R2",
                "GShard is better than dense at equal active parameters",
                "Lepikhin et al. 2020",
                "S",
                less("eval.bpb", "gshard", "dense"),
            ),
            Claim(
                "R3",
                "Loss-free is better than dense at equal active parameters",
                "Wang et al. 2024",
                "S",
                less("eval.bpb", "loss_free", "dense"),
            ),
            Claim(
                "R4",
                "GShard top-2 is better than Switch top-1",
                "Lepikhin et al. 2020; Dai et al. 2024, Table 1",
                "D",
                less("eval.bpb", "gshard", "switch"),
            ),
            Claim(
                "R5",
                "Expert choice trained on the pool loses when it is evaluated causally: it leaks",
                "Wang et al. 2024, section 5.2",
                "S",
                positive("eval.leak", "expert_choice"),
            ),
            Claim(
                "R6",
                "Loss-free balances better than a balance loss (MaxVio over the evaluation set)",
                "Wang et al. 2024, Table 2",
                "D",
                ratio_at_least("eval.max_vio_global", "switch", "loss_free", 1.0),
            ),
        ),
    )
