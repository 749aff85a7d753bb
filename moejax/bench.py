"""The layer's speed beside a dense feed-forward network of equal active FLOPs: moejax bench

All candidates are timed in turn in one process, forward and backward, data passed as arguments. The
ratios are medians over turns: they survive a busy machine, single times do not.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from moejax import cli
from moejax.dispatch import DISPATCH, Experts, Plan, experts_grouped, make_plan, route
from moejax.moe import MoeOptions, MoeParams, moe
from moejax.routing import RouterInput, Routing, make_router

REPEATS = flags.DEFINE_integer("repeats", 5, "turns; more for a busy machine")
JSON = flags.DEFINE_string("json", None, "also write the figures here")


class Shape(NamedTuple):
    """Sizes of a layer; K experts a token."""

    dim: int
    ffn: int
    experts: int
    k: int
    tokens: int


class Row(NamedTuple):
    """One line of the table: a ratio of rates, and the budget it must reach."""

    what: str
    ratio: float
    budget: str
    held: bool


BIG = Shape(dim=512, ffn=2048, experts=16, k=2, tokens=8192)
EIGHT = Shape(dim=256, ffn=1024, experts=8, k=2, tokens=4096)
SIXTEEN = Shape(dim=256, ffn=1024, experts=16, k=2, tokens=4096)


def in_turns(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each candidate, one of each a turn, after a first turn that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def rate(seconds: dict[str, np.ndarray], name: str, against: str) -> float:
    """How many times as fast `name` is as `against`: the median over turns."""
    return float(np.median(seconds[against] / seconds[name]))


def both_ways(function: Callable[..., jax.Array], *arguments: Any) -> Callable[[], Any]:
    """Forward and the gradients of all (float) arguments but the last, which is data."""
    *trained, data = arguments
    loss = jax.jit(jax.grad(lambda trained, data: jnp.square(function(*trained, data)).sum()))
    return lambda: loss(tuple(trained), data)


def weights(shape: Shape) -> Experts:
    """Random SwiGLU experts."""
    e, d, f = shape.experts, shape.dim, shape.ffn
    keys = jax.random.split(jax.random.key(0), 3)
    return Experts(
        jax.random.normal(keys[0], (e, d, f)) / d**0.5,
        jax.random.normal(keys[1], (e, f, d)) / f**0.5,
        jax.random.normal(keys[2], (e, d, f)) / d**0.5,
    )


def plan_of(shape: Shape, skew: float, capacity: float | None = None) -> Plan:
    """A top-k plan whose expert loads follow a Zipf law of exponent `skew` (0 = uniform)."""
    popularity_E = -skew * jnp.log(jnp.arange(1, shape.experts + 1))
    noise_TE = jax.random.gumbel(jax.random.key(1), (shape.tokens, shape.experts))
    r = RouterInput(popularity_E[None] + noise_TE, jnp.ones(shape.tokens, bool))
    routing: Routing = route(make_router("topk", {"k": shape.k}).route, r, 1, "batch")
    return make_plan(routing, capacity)


def dense(p: Experts, x_ND: jax.Array, _: Any) -> jax.Array:
    """One expert as a dense network, on every row."""
    assert p.w_gate_EDF is not None
    h_NF = jax.nn.silu(x_ND @ p.w_gate_EDF[0]) * (x_ND @ p.w_in_EDF[0])
    return h_NF @ p.w_out_EFD[0]


def ragged(p: Experts, x_ND: jax.Array, load_E: jax.Array) -> jax.Array:
    """The experts by `lax.ragged_dot`, which a CPU computes masked-dense."""
    assert p.w_gate_EDF is not None
    gate_NF = jax.nn.silu(jax.lax.ragged_dot(x_ND, p.w_gate_EDF, load_E))
    return jax.lax.ragged_dot(
        gate_NF * jax.lax.ragged_dot(x_ND, p.w_in_EDF, load_E), p.w_out_EFD, load_E
    )


def experts_rows(repeats: int) -> list[Row]:
    """The dropless layer against dense and `lax.ragged_dot`, and its overhead."""
    p, one = weights(BIG), weights(BIG._replace(experts=1))
    rows_ND = jax.random.normal(jax.random.key(2), (BIG.tokens * BIG.k, BIG.dim))
    x_TD = rows_ND[: BIG.tokens]

    def dropless(skew: float) -> Callable[[], Any]:
        plan = plan_of(BIG, skew)
        return both_ways(
            lambda p, x, plan: DISPATCH["dropless"](p, x, plan, "swiglu")[0], p, x_TD, plan
        )

    options = MoeOptions(make_router("topk", {"k": BIG.k}))
    w_DE = jax.random.normal(jax.random.key(3), (BIG.dim, BIG.experts)) / BIG.dim**0.5

    def whole(w_DE: jax.Array, p: Experts, x_TD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        return moe(MoeParams(w_DE, p), x_TD[None], options=options, valid_BS=valid_BS)[0]

    seconds = in_turns(
        {
            "dense": both_ways(dense, one, rows_ND, None),
            "uniform": dropless(0.0),
            "zipf": dropless(1.0),
            "experts": both_ways(
                lambda p, x, load: experts_grouped(p, x, load, "swiglu"),
                p,
                rows_ND,
                plan_of(BIG, 0.0).load_E,
            ),
            "layer": both_ways(whole, w_DE, p, x_TD, jnp.ones((1, BIG.tokens), bool)),
        },
        repeats,
    )
    overhead = 1 - rate(seconds, "layer", "experts")
    small, load_E = weights(EIGHT), plan_of(EIGHT, 0.0).load_E
    small_ND = rows_ND[: EIGHT.tokens * EIGHT.k, : EIGHT.dim]
    eight = in_turns(
        {
            "ours": both_ways(
                lambda p, x, load: experts_grouped(p, x, load, "swiglu"), small, small_ND, load_E
            ),
            "ragged_dot": both_ways(ragged, small, small_ND, load_E),
        },
        repeats,
    )
    uniform, zipf = rate(seconds, "uniform", "dense"), rate(seconds, "zipf", "dense")
    against = rate(eight, "ours", "ragged_dot")
    return [
        Row("dropless / dense FFN, uniform load", uniform, ">= 0.9", uniform >= 0.9),
        Row("dropless / dense FFN, Zipf load", zipf, ">= 0.7", zipf >= 0.7),
        Row("dropless / lax.ragged_dot, E=8", against, ">= 5", against >= 5),
        Row("router + dispatch + combine, share", overhead, "<= 0.15", overhead <= 0.15),
    ]


def gather_row(repeats: int) -> Row:
    """The capacity layer by gather against the one-hot einsum."""
    p, plan = weights(SIXTEEN), plan_of(SIXTEEN, 0.0, 1.25)
    x_TD = jax.random.normal(jax.random.key(2), (SIXTEEN.tokens, SIXTEEN.dim))

    def layer(name: str) -> Callable[[], Any]:
        return both_ways(lambda p, x, plan: DISPATCH[name](p, x, plan, "swiglu")[0], p, x_TD, plan)

    ratio = rate(
        in_turns({"gather": layer("gather"), "einsum": layer("einsum")}, repeats),
        "gather",
        "einsum",
    )
    return Row("gather / one-hot einsum, E=16", ratio, ">= 3", ratio >= 3)


def main(arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}")
    rows = [*experts_rows(REPEATS.value), gather_row(REPEATS.value)]
    print(f"{'forward + backward, float32':<40}{'measured':>10}{'budget':>10}")
    for row in rows:
        print(f"{row.what:<40}{row.ratio:>10.2f}{row.budget:>10}{'' if row.held else '  MISSED'}")
    if JSON.value:
        device = jax.devices()[0].device_kind
        table = {"device": device, "rows": [row._asdict() for row in rows]}
        Path(JSON.value).write_text(json.dumps(table, indent=2))
    return 0


if __name__ == "__main__":
    cli.run(main)
