"""PyTorch at the same sizes, on the same cores or the same GPU: extra `bench`.

Hugging Face's Mixtral block, with its own router; and PyTorch's grouped matmul alone, on sorted
rows.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np

from moejax.benching.shapes import Case, plan_of


def possible() -> bool:
    """Whether the packages are installed, and PyTorch runs where JAX does."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return False
    import torch

    return jax.default_backend() == "cpu" or torch.cuda.is_available()


def runs(case: Case, both: bool, dtype: str) -> dict[str, Callable[[], Any]]:
    """Peer -> its forward pass, or forward and backward; {} where that is not `possible`, or the
    case has a skew that their routers do not."""
    if not possible() or case.skew != "uniform":
        return {}
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    to = {"device": device, "dtype": getattr(torch, dtype)}
    return {
        "HF Mixtral": _made_at_first(lambda: _step(both, *_block(case, to))),
        "torch grouped": _made_at_first(lambda: _step(both, *_grouped(case, to))),
    }


def _made_at_first(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    made = cache(make)
    return lambda: made()()


class _Running:
    """What PyTorch was asked for and may not have finished."""

    def block_until_ready(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _step(both: bool, function: Callable[[], Any], trained: list[Any]) -> Callable[[], Any]:
    import torch

    def forward() -> _Running:
        with torch.no_grad():
            function()
        return _Running()

    def forward_backward() -> _Running:
        torch.autograd.grad(function().float().square().sum(), trained)
        return _Running()

    return forward_backward if both else forward


def _block(case: Case, to: dict[str, Any]) -> tuple[Callable[[], Any], list[Any]]:
    """The block with random weights on tokens that want a gradient, and all that wants one."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=case.dim,
        intermediate_size=case.ffn,
        num_local_experts=case.experts,
        num_experts_per_tok=case.k,
    )
    config._experts_implementation = "grouped_mm"  # 2-4 times as fast as "eager" on a CPU
    with torch.device(to["device"]):
        block = MixtralSparseMoeBlock(config).to(**to)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    x_BSD = torch.randn(1, case.tokens, case.dim, requires_grad=True, **to)

    def outputs() -> Any:
        y_BSD = block(x_BSD)
        return y_BSD[0] if isinstance(y_BSD, tuple) else y_BSD

    return outputs, [x_BSD, *block.parameters()]


def _grouped(case: Case, to: dict[str, Any]) -> tuple[Callable[[], Any], list[Any]]:
    """The experts of sorted rows by `torch.nn.functional.grouped_mm`, at the load of our plan."""
    import torch
    from torch.nn.functional import grouped_mm, silu

    def normal(*shape: int) -> Any:
        made = torch.randn(shape, **to) * (shape[-2] ** -0.5 if len(shape) == 3 else 1)
        return made.requires_grad_()

    e, d, f = case.experts, case.dim, case.ffn
    x_ND, w_out_EFD = normal(case.tokens * case.k, d), normal(e, f, d)
    w_in_EDF, w_gate_EDF = normal(e, d, f), normal(e, d, f)
    end_E = np.cumsum(np.asarray(plan_of(case).load_E))
    ends = torch.tensor(end_E, dtype=torch.int32, device=to["device"])

    def outputs() -> Any:
        gate_NF = silu(grouped_mm(x_ND, w_gate_EDF, offs=ends))
        return grouped_mm(gate_NF * grouped_mm(x_ND, w_in_EDF, offs=ends), w_out_EFD, offs=ends)

    return outputs, [x_ND, w_in_EDF, w_gate_EDF, w_out_EFD]
