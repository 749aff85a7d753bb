"""Every router of the catalogue on the same text: does each train, and stay balanced?

    moejax compare experiments/catalogue.py:smoke

One seed and 200 steps an arm, all of the same active parameters where the method allows it: this
finds what breaks or collapses, it does not rank. Takes about ten minutes on two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import base
from moejax.reporting import Suite


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.get_config(scale)
    config.moe.update(experts=2 * config.moe.experts, ffn=config.model.ffn // 2)
    if scale == "smoke":
        config.train.update(steps=200, eval_every=100, checkpoint_every=200)
    return config


def arm(router: str, **changes: Any) -> dict[str, Any]:
    """A variant: keys of `router` bare, others as section__key."""
    named = {key.replace("__", "."): value for key, value in changes.items() if "__" in key}
    own = {f"router.{key}": value for key, value in changes.items() if "__" not in key}
    return {"router.name": router, **own, **named}


def get_suite(scale: str = "smoke") -> Suite:
    config, model = get_config(scale), base.get_config(scale).model
    rate = base.bias_rate(scale)
    top1 = {"moe__experts": base.get_config(scale).moe.experts, "moe__ffn": model.ffn}
    balance = {"balance__load_balance": 0.01}
    cv = {"balance__importance": 0.01, "balance__load": 0.01}
    capacity = {"moe__dispatch": "gather", "moe__capacity_factor": 1.25}
    variants = {
        "dense": {"moe.experts": 0},
        # token choice
        "switch": arm("switch", **top1, **balance, **capacity, moe__router_scale=0.1),
        "gshard_top2": arm("gshard_top2", **capacity, balance__load_balance_top1=0.01),
        "topk": arm("topk", **balance, balance__router_z=0.001),
        "mixtral": arm("topk", renormalise=True, **balance),
        "noisy_topk": arm("noisy_topk", **cv),
        "hierarchical": arm("hierarchical", **cv),
        "vmoe": arm("vmoe", order="bpr", **cv, **capacity),
        "deepseek_moe": arm("deepseek_moe", **balance),
        "deepseek_v2": arm(
            "deepseek_v2",
            expert_groups=4,
            top_groups=2,
            **balance,
            balance__device=0.01,
            balance__communication=0.01,
        ),
        "deepseek_v3": arm(
            "deepseek_v3",
            expert_groups=4,
            top_groups=2,
            bias_rate=rate,
            balance__load_balance_sequence=0.001,
        ),
        "loss_free": arm("loss_free", bias_rate=rate),
        "quantile_balancing": arm("quantile_balancing"),
        "hash": arm("hash", **top1),
        "top_p": arm("top_p", **balance),
        # assignment
        "expert_choice": arm("expert_choice", **capacity, moe__eval_groups="position"),
        "expert_choice_capped": arm("expert_choice_capped", **capacity),
        # Its auction takes rounds over all tokens of a group: small groups.
        "base": arm("base", **top1, epsilon=1e-2, moe__groups="sequence"),
        "sinkhorn": arm("sinkhorn", k=2),
        "token_rounding": arm("token_rounding", tile=16, **balance),
        # differentiable and dense-gradient
        "remoe": arm("remoe", balance__active_l1=1.0),
        "sparsemixer2": arm("sparsemixer2", k=1, **top1, **balance),
        "densemixer": arm("densemixer", **balance),
        "default_moe": arm("default_moe", **balance),
        "dselect_k": arm("dselect_k", balance__selector_entropy=0.01),
        "soft": {"moe.slots": 2 * config.data.sequence // config.moe.experts},
    }
    return Suite(
        name="catalogue",
        scale=scale,
        question="Does every router of the catalogue train, and stay balanced?",
        variants=variants,
        unmatched={
            "hierarchical": "four experts a token, by the method",
            "top_p": "up to four experts a token, by the method",
            "soft": "slots are parameters",
        },
        seeds=(0,),
        claims=(),
    )
