"""Text whose truth is known: which router finds the sources, and how near comes it to the optimum?

    moejax compare experiments/markov.py:smoke

Four Markov chains, one chain a document; each shares half of its letters with the next
(`moejax.data.markov`). The ideal experts are known, one for each chain, and so is the entropy,
which no model can pass. So what is a matter of taste elsewhere is a number here: `eval.recovered`
is the share of tokens at the expert of their chain (a quarter: by chance; a half: the best that a
look at the letter gives; 1: all, from context), `eval.bpb` minus the entropy what is left to learn.
An arm takes half a minute on two cores.
"""

from ml_collections import ConfigDict

from experiments import base
from moejax.data.markov import CHAINS, entropy
from moejax.reporting import Claim, Suite, less, ratio_at_least


def get_config(scale: str = "smoke") -> ConfigDict:
    config = base.get_config(scale)
    config.data.update(name="markov", sequence=128, batch=16)
    config.model.update(layers=2, dim=64, heads=2, ffn=32, dtype="float32")
    config.moe.update(experts=len(CHAINS), first_dense=1)
    config.optimizer.update(learning_rate=6e-3, warmup=20)
    steps = 200 if scale == "smoke" else 2000
    config.train.update(steps=steps, log_every=10, eval_every=steps // 2, checkpoint_every=steps)
    return config


def get_suite(scale: str = "smoke") -> Suite:
    top1 = {"router.name": "topk", "router.k": 1}
    return Suite(
        name="markov",
        scale=scale,
        question="Does a router find the sources of a text, where they are known?",
        variants={
            "dense": {"moe.experts": 0},
            "hash": {"router.name": "hash"},
            "unbalanced": top1,
            "aux": {**top1, "balance.load_balance": 0.01},
            "loss_free": {"router.name": "loss_free", "router.k": 1, "router.bias_rate": 1e-2},
            "expert_choice": {"router.name": "expert_choice", "router.k": 1},
        },
        descriptions={
            "dense": f"one feed-forward network; no model is better than {entropy():.4f} bits",
            "hash": "by the letter, at random",
            "unbalanced": "top-1 of softmax, no balance loss",
            "aux": "top-1 of softmax, balance loss 0.01",
            "loss_free": "top-1 of sigmoid + bias",
            "expert_choice": "experts choose tokens of the batch",
        },
        seeds=(0, 1, 2),
        claims=(
            Claim(
                "MK1",
                "A learned, balanced router recovers more of the sources than hashing",
                "by construction: a random table of letters knows little of the chains",
                "S",
                ratio_at_least("eval.recovered", "aux", "hash", 1.0),
            ),
            Claim(
                "MK2",
                "So does loss-free",
                "by construction",
                "S",
                ratio_at_least("eval.recovered", "loss_free", "hash", 1.0),
            ),
            Claim(
                "MK3",
                "Experts that find the sources predict better than a dense network",
                "Fedus et al. 2021",
                "D",
                less("eval.bpb", "aux", "dense"),
            ),
            Claim(
                "MK4",
                "Without balance a router recovers less than with it",
                "Shazeer et al. 2017",
                "D",
                ratio_at_least("eval.recovered", "aux", "unbalanced", 1.0),
            ),
        ),
    )
