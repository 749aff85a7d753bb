"""The experts of a layer, by each way to reach them, beside a dense network of equal FLOPs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.benching.shapes import CAPACITY, Case, plan_of, rows, weights
from moejax.benching.timing import compiled, in_turns, rate
from moejax.dispatch import DISPATCH, Experts, experts_grouped
from moejax.moe import MoeOptions, MoeParams, moe
from moejax.routing import make_router

Function = Callable[..., jax.Array]


class Measured(NamedTuple):
    """One line of the table.

    Attributes:
      case, sizes, skew: of what.
      way: 'dense', a dispatch, 'ragged_dot', 'experts' (of sorted rows, no dispatch), or 'layer'
        (with router).
      both: forward and backward; False = forward only.
      seconds: median over turns; low, high: their quartiles.
      flops_per_s: of the active FLOPs: dropped or padded rows do not count.
      share: of the dense network's rate, the median over turns.
      temp_bytes, compile_seconds: of its program.
    """

    case: str
    sizes: str
    skew: str
    way: str
    both: bool
    seconds: float
    low: float
    high: float
    flops_per_s: float
    share: float
    temp_bytes: int
    compile_seconds: float

    @property
    def key(self) -> str:
        """Names the line in a saved run."""
        return f"{self.case} | {self.way} | {self.passes}"

    @property
    def passes(self) -> str:
        return "forward + backward" if self.both else "forward"


def dense(p: Experts, x_ND: jax.Array, _: Any) -> jax.Array:
    """One expert as a dense network, on every row."""
    assert p.w_gate_EDF is not None
    h_NF = jax.nn.silu(x_ND @ p.w_gate_EDF[0]) * (x_ND @ p.w_in_EDF[0])
    return h_NF @ p.w_out_EFD[0]


def ragged(p: Experts, x_ND: jax.Array, load_E: jax.Array) -> jax.Array:
    """The experts by `lax.ragged_dot`, which a CPU computes masked-dense."""
    assert p.w_gate_EDF is not None
    gate_NF = jax.nn.silu(jax.lax.ragged_dot(x_ND, p.w_gate_EDF, load_E))
    h_NF = gate_NF * jax.lax.ragged_dot(x_ND, p.w_in_EDF, load_E)
    return jax.lax.ragged_dot(h_NF, p.w_out_EFD, load_E)


def both_ways(function: Function) -> Callable[..., Any]:
    """The gradients of all arguments but the last, which is data."""

    def loss(trained: tuple[Any, ...], data: Any) -> jax.Array:
        return jnp.square(function(*trained, data).astype(jnp.float32)).sum()

    return lambda *arguments: jax.grad(loss)(arguments[:-1], arguments[-1])


def candidates(case: Case, dtype: Any) -> dict[str, tuple[Function, tuple[Any, ...]]]:
    """way -> (function, its arguments, of which the last is data)."""
    p, number = weights(case, dtype=dtype), case.tokens * case.k
    x_ND, x_TD = rows(case, number, dtype), rows(case, case.tokens, dtype)
    sorted_load_E = plan_of(case).load_E
    found: dict[str, tuple[Function, tuple[Any, ...]]] = {
        "dense": (dense, (weights(case, 1, dtype), x_ND, None))
    }

    def layer(name: str) -> Function:
        return lambda p, x_TD, plan: DISPATCH[name](p, x_TD, plan, "swiglu")[0]

    for way in case.ways:
        if way == "ragged_dot":
            found[way] = ragged, (p, x_ND, sorted_load_E)
        elif way == "experts":
            grouped = lambda p, x, load: experts_grouped(p, x, load, "swiglu")  # noqa: E731
            found[way] = grouped, (p, x_ND, sorted_load_E)
        elif way == "layer":
            found[way] = _whole(case), (_router(case), p, x_TD, jnp.ones((1, case.tokens), bool))
        else:
            plan = plan_of(case, None if way == "dropless" else CAPACITY)
            found[way] = layer(way), (p, x_TD, plan)
    return found


def _router(case: Case) -> jax.Array:
    w_DE = jax.random.normal(jax.random.key(3), (case.dim, case.experts))
    return w_DE / case.dim**0.5


def _whole(case: Case) -> Function:
    options = MoeOptions(make_router("topk", {"k": case.k}))

    def layer(w_DE: jax.Array, p: Experts, x_TD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        return moe(MoeParams(w_DE, p), x_TD[None], options=options, valid_BS=valid_BS)[0]

    return layer


def measure(
    case: Case, repeats: int, both: bool = True, dtype: Any = jnp.float32
) -> list[Measured]:
    """A line for the dense network and for each way of the case."""
    programs = {
        way: compiled(both_ways(function) if both else function, *arguments)
        for way, (function, arguments) in candidates(case, dtype).items()
    }
    seconds = in_turns({way: program.run for way, program in programs.items()}, repeats)
    flops = case.flops * (3 if both else 1)
    return [
        Measured(
            *(case.name, case.sizes, case.skew, way, both),
            seconds=float(np.median(taken)),
            low=float(np.quantile(taken, 0.25)),
            high=float(np.quantile(taken, 0.75)),
            flops_per_s=flops / float(np.median(taken)),
            share=rate(seconds, way, "dense"),
            temp_bytes=programs[way].temp_bytes,
            compile_seconds=programs[way].compile_seconds,
        )
        for way, taken in seconds.items()
    ]
