"""Switch Transformer: does top-1 routing with a balance loss train (Fedus et al. 2021, 2101.03961)?

    moejax train --config=experiments/switch.py:smoke --workdir=/tmp/switch
    moejax compare experiments/switch.py:smoke

The comparison is the paper's Table 1, and what it says of initialisation, precision and noise.
Capacity factors are quoted as there, without K: at one quoted factor all arms have as many slots,
so top-2 gets half of it for each choice. Takes minutes on two CPU cores.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import base
from moejax.config import router_config
from moejax.reporting import (
    Claim,
    Suite,
    all_of,
    contrast,
    falling,
    less,
    positive,
    similar,
    steadier,
)
from moejax.routing import RouterInput, Routing, token_choice, token_noise

PAPER = "Fedus et al. 2021"
FACTORS = ("1", "1.25", "2")


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.many_arms(scale)
    config.router = router_config("switch")
    config.moe.update(dispatch="gather", capacity_factor=1.25, eval_capacity_factor=2.0)
    config.moe.update(jitter=0.01, router_scale=0.1)
    config.balance.load_balance = 0.01
    return config


def sampled(r: RouterInput) -> Routing:
    """Switch that draws its expert in training, as its probabilities say (Table 11)."""
    probs_TE, noisy_TE = jax.nn.softmax(r.logits_TE), r.logits_TE
    if r.key is not None:
        shape = noisy_TE.shape[-1:]
        noisy_TE = noisy_TE + token_noise(r, lambda key: jax.random.gumbel(key, shape))
    best_T = noisy_TE.argmax(-1)
    weight_T1 = jnp.take_along_axis(probs_TE, best_T[:, None], axis=-1)
    return token_choice(r, best_T[:, None], weight_T1, probs_TE)


def rounded(r: RouterInput) -> Routing:
    """Switch whose logits and probabilities are bfloat16 (Table 2). Sums: `flips`, tokens that
    float32 would have sent to another expert."""
    probs_TE = jax.nn.softmax(r.logits_TE.astype(jnp.bfloat16)).astype(jnp.float32)
    best_T = probs_TE.argmax(-1)
    weight_T1 = jnp.take_along_axis(probs_TE, best_T[:, None], axis=-1)
    flips = (r.valid_T & (best_T != r.logits_TE.argmax(-1))).sum(dtype=jnp.int32)
    routing = token_choice(r, best_T[:, None], weight_T1, probs_TE)
    return routing._replace(sums={"flips": flips})


def get_suite(scale: str = "smoke") -> Suite:
    config = get_config(scale)
    model, rate = config.model, 3 * config.optimizer.learning_rate
    other = "float32" if model.dtype == "bfloat16" else "bfloat16"
    top2 = {"router.name": "topk", "router.k": 2, "router.renormalise": True, "moe.jitter": 0.0}
    hot = {"optimizer.learning_rate": rate, "moe.router_scale": 1.0}
    wide = {"model.dim": 2 * model.dim, "model.ffn": 2 * model.ffn, "model.heads": 2 * model.heads}
    switches = {f"switch_{cf}": {"moe.capacity_factor": float(cf)} for cf in FACTORS}
    halves = {
        f"top2_{cf}": {
            **top2,
            "moe.capacity_factor": float(cf) / 2,
            "moe.eval_capacity_factor": 1.0,
        }
        for cf in FACTORS
    }
    fewer = {f"switch_e{e}": {"moe.experts": e} for e in (2, 4)}
    variants = {
        "dense": {"moe.experts": 0},
        **switches,
        **halves,
        **fewer,
        "top2_dropless": {
            **top2,
            "moe.dispatch": "dropless",
            "moe.capacity_factor": None,
            "moe.eval_capacity_factor": None,
        },
        "argmax": {"moe.jitter": 0.0},
        "sampled": {"router.name": sampled, "moe.jitter": 0.0},
        other: {"model.dtype": other},
        "bfloat16_router": {"model.dtype": "bfloat16", "router.name": rounded},
        "hot_init_1": hot,
        "hot_init_0.1": {**hot, "model.init_scale": 0.1},
        "dense_3.4x": {"moe.experts": 0, **wide},
    }
    slots = "two experts of full width a token, but as many slots as Switch at this quoted factor"
    return Suite(
        name="switch",
        scale=scale,
        question="What does top-1 routing buy at equal compute, and how many slots does it need?",
        variants=variants,
        descriptions={
            "dense": "one feed-forward network a layer",
            **{name: f"top-1, capacity factor {name[7:]}, jitter 0.01" for name in switches},
            **{name: f"top-2 renormalised, quoted capacity factor {name[5:]}" for name in halves},
            **{name: f"top-1 of {name[8:]} experts, capacity factor 1.25" for name in fewer},
            "top2_dropless": "top-2 renormalised, nothing drops",
            "argmax": "switch_1.25 without jitter",
            "sampled": "switch_1.25 that draws its expert in training",
            other: f"switch_1.25 with activations in {other}; the router stays in float32",
            "bfloat16_router": "the router's logits and probabilities in bfloat16 as well",
            "hot_init_1": "switch_1.25 at 3 times the learning rate",
            "hot_init_0.1": "the same, all weights of a tenth of the variance at first",
            "dense_3.4x": "twice the width: 3.4 times the FLOPs, as T5-Large to T5-Base",
        },
        matched="text and its order, steps, batch, the model around the experts, "
        "active parameters; Switch and top-2 at one quoted factor: slots of all experts together",
        unmatched={
            **dict.fromkeys(halves, slots),
            "top2_dropless": "twice the FLOPs in experts",
            other: f"activations in {other}",
            "bfloat16_router": "activations in bfloat16",
            "hot_init_1": "3 times the learning rate",
            "hot_init_0.1": "3 times the learning rate, and another initialisation",
            "dense_3.4x": "3.4 times the FLOPs, by intent",
        },
        limits=base.limits(
            scale,
            "not measured: a matmul of the router in bfloat16 (its products are float32, then "
            "rounded), hours to a loss on 32 TPU cores, 128 experts",
        ),
        claims=claims(other),
    )


def claims(other: str) -> tuple[Claim, ...]:
    best = "eval.bpb"
    gap = {"top2_1": 1.0, "top2_2": -1.0, "switch_1": -1.0, "switch_2": 1.0}
    return (
        Claim(
            "SW1",
            "Switch is better than dense at each capacity factor",
            f"{PAPER}, Table 1",
            "S",
            all_of(*(less(best, f"switch_{cf}", "dense") for cf in FACTORS)),
        ),
        Claim(
            "SW1-4",
            "... and with 4 experts",
            f"{PAPER}, appendix D",
            "S",
            less(best, "switch_e4", "dense"),
        ),
        Claim(
            "SW1-2", "... and with 2", f"{PAPER}, appendix D", "D", less(best, "switch_e2", "dense")
        ),
        Claim(
            "SW2",
            "Fewer drops with more capacity, for Switch and for top-2",
            f"{PAPER}, section 2.2",
            "S",
            all_of(
                *(
                    falling("train.drop", *(f"{arm}_{cf}" for cf in FACTORS), margin=0.1)
                    for arm in ("switch", "top2")
                )
            ),
        ),
        Claim(
            "SW2-loss",
            "A lower loss with more capacity, for both",
            f"{PAPER}, Table 1",
            "D",
            all_of(
                *(falling(best, *(f"{arm}_{cf}" for cf in FACTORS)) for arm in ("switch", "top2"))
            ),
        ),
        Claim(
            "SW3",
            "Top-2 loses more than Switch when capacity falls from 2 to 1",
            f"{PAPER}, Table 1: .025 against .007 nats",
            "D",
            contrast(best, gap),
        ),
        *(
            Claim(
                f"SW4-{cf}",
                f"Switch is better than top-2 at quoted factor {cf}",
                f"{PAPER}, Table 1: {'no' if cf == '2' else 'yes'}",
                "R",
                less(best, f"switch_{cf}", f"top2_{cf}"),
            )
            for cf in FACTORS
        ),
        Claim(
            "SW5",
            "At a high learning rate, a tenth of the initial variance makes seeds agree more",
            f"{PAPER}, Table 3: sd .01 against .68",
            "S",
            steadier(best, "hot_init_0.1", "hot_init_1"),
        ),
        Claim(
            "SW6",
            "With the router in float32, all else in bfloat16 costs nothing",
            f"{PAPER}, Table 2: -1.716 against -1.718",
            "S",
            similar(best, other, "switch_1.25"),
        ),
        Claim(
            "SW6-flips",
            "A router in bfloat16 sends tokens to other experts",
            f"{PAPER}, section 2.4",
            "S",
            positive("train.own.flips", "bfloat16_router"),
        ),
        Claim(
            "SW6-router",
            "... and costs loss, all else in bfloat16 too",
            f"{PAPER}, Table 2: -3.780 against -1.716",
            "R",
            less(best, other if other == "bfloat16" else "switch_1.25", "bfloat16_router"),
        ),
        Claim(
            "SW7",
            "Drawing the expert is worse than taking the best",
            f"{PAPER}, Table 11: -1.570 against -1.471",
            "D",
            less(best, "argmax", "sampled"),
        ),
        Claim(
            "SW7-jitter",
            "Jitter changes little",
            f"{PAPER}, Table 11: -1.468 against -1.471",
            "D",
            similar(best, "switch_1.25", "argmax"),
        ),
        Claim(
            "SW8",
            "Switch is as good as a dense model of 3.4 times the FLOPs",
            f"{PAPER}, Table 1: -1.561 against -1.550",
            "R",
            similar(best, "switch_1", "dense_3.4x"),
        ),
    )
