"""The experts of a layer, by each way to reach them, beside a dense network of equal FLOPs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.benching.shapes import CAPACITY, Case, plan_of, rows, weights
from moejax.benching.timing import Compiled, compiled, in_turns, rate
from moejax.dispatch import DISPATCH, Experts, experts_grouped
from moejax.dispatch.grouped import IMPLEMENTATIONS, grouped_ffn
from moejax.dispatch.measured import reason
from moejax.moe import MoeOptions, MoeParams, moe
from moejax.routing import make_router

Function = Callable[..., jax.Array]


class Failed(NamedTuple):
    """A way that could not be measured, and why."""

    case: str
    way: str
    both: bool
    why: str


class Measured(NamedTuple):
    """One line of the table.

    Attributes:
      case, sizes, skew: of what.
      way: 'dense', a dispatch, 'layer' (with router), 'experts' (of sorted rows, no dispatch),
        the same by a grouped product that is named ('ragged_dot', ...), or a peer.
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
        if way in IMPLEMENTATIONS:
            found[way] = partial(_experts_by, way), (p, x_ND, sorted_load_E)
        elif way == "experts":
            grouped = lambda p, x, load: experts_grouped(p, x, load, "swiglu")  # noqa: E731
            found[way] = grouped, (p, x_ND, sorted_load_E)
        elif way == "layer":
            found[way] = _whole(case), (_router(case), p, x_TD, jnp.ones((1, case.tokens), bool))
        else:
            plan = plan_of(case, None if way == "dropless" else CAPACITY)
            found[way] = layer(way), (p, x_TD, plan)
    return found


def _experts_by(name: str, p: Experts, x_ND: jax.Array, load_E: jax.Array) -> jax.Array:
    return grouped_ffn(x_ND, p.w_in_EDF, p.w_gate_EDF, p.w_out_EFD, load_E, by=name, tail=False)


def _router(case: Case) -> jax.Array:
    w_DE = jax.random.normal(jax.random.key(3), (case.dim, case.experts))
    return w_DE / case.dim**0.5


def _whole(case: Case) -> Function:
    options = MoeOptions(make_router("topk", {"k": case.k}))

    def layer(w_DE: jax.Array, p: Experts, x_TD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        return moe(MoeParams(w_DE, p), x_TD[None], options=options, valid_BS=valid_BS)[0]

    return layer


def measure(
    case: Case,
    repeats: int,
    both: bool = True,
    dtype: Any = jnp.float32,
    peers: Mapping[str, Callable[[], Any]] | None = None,
) -> tuple[list[Measured], list[Failed]]:
    """A line for the dense network, for each way of the case, and for each peer; and those that do
    not run here: a kernel may refuse sizes or chips, and memory may not suffice."""
    programs: dict[str, Compiled] = {}
    failed: list[Failed] = []
    making = {
        way: partial(compiled, both_ways(function) if both else function, *arguments)
        for way, (function, arguments) in candidates(case, dtype).items()
    }
    making |= {way: partial(Compiled, run) for way, run in (peers or {}).items()}
    for way, make in making.items():
        try:
            made = make()
            jax.block_until_ready(made.run())
        except Exception as error:  # whatever a kernel library says
            if way == "dense":
                raise
            failed.append(Failed(case.name, way, both, reason(error)))
        else:
            programs[way] = made
    # Threads of a peer go on waiting for a while after its turn: apart, they take nobody's time.
    ours = [way for way in programs if way not in (peers or {})]
    theirs = ["dense", *(way for way in programs if way not in ours)]
    flops, lines = case.flops * (3 if both else 1), []
    for group in (ours, theirs) if peers else (ours,):
        seconds = in_turns({way: programs[way].run for way in group}, repeats)
        lines += [
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
            if group is ours or way != "dense"
        ]
    return lines, failed
