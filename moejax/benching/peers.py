"""Hugging Face's Mixtral block in PyTorch at the same sizes, on the same threads: extra `bench`."""

import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.benching.layer import Measured, both_ways, candidates
from moejax.benching.shapes import Case
from moejax.benching.timing import compiled, in_turns, rate


def possible() -> bool:
    """Whether the packages are installed, and both run on the same CPU."""
    there = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    return there and jax.default_backend() == "cpu"


def measure(case: Case, repeats: int) -> list[Measured]:
    """Its forward and backward pass in turns with ours of the dense network; [] where that is not
    `possible`."""
    if not possible() or case.skew != "uniform":
        return []
    function, arguments = candidates(case, jnp.float32)["dense"]
    dense = compiled(both_ways(function), *arguments)
    block, x_BSD = _block(case)

    def run() -> Any:
        y_BSD = block(x_BSD)
        y_BSD = y_BSD[0] if isinstance(y_BSD, tuple) else y_BSD
        y_BSD.square().sum().backward()
        block.zero_grad()
        x_BSD.grad = None

    seconds = in_turns({"dense": dense.run, "mixtral": run}, repeats)
    taken = seconds["mixtral"]
    return [
        Measured(
            *(case.name, case.sizes, "its own router", "HF Mixtral", True),
            seconds=float(np.median(taken)),
            low=float(np.quantile(taken, 0.25)),
            high=float(np.quantile(taken, 0.75)),
            flops_per_s=3 * case.flops / float(np.median(taken)),
            share=rate(seconds, "mixtral", "dense"),
            temp_bytes=0,
            compile_seconds=0.0,
        )
    ]


def _block(case: Case) -> tuple[Any, Any]:
    """The block with random weights, and tokens that want a gradient."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=case.dim,
        intermediate_size=case.ffn,
        num_local_experts=case.experts,
        num_experts_per_tok=case.k,
    )
    config._experts_implementation = "grouped_mm"  # 2-4 times as fast as "eager" on a CPU
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return block, torch.randn(1, case.tokens, case.dim, requires_grad=True)
