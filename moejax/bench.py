"""The layer's speed beside a dense feed-forward network of equal active FLOPs: moejax bench

All that is compared is timed in turns in one process, after a warm-up. Ratios are medians over
turns: they survive a busy machine, single times do not. --full changes one size after the other: E,
K, D, F, T and the load's skew.
"""

import json
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from moejax import cli
from moejax.benching import layer, peers, show
from moejax.benching.layer import Measured
from moejax.benching.shapes import CASES, EIGHT, LARGE, SIXTEEN, sweep
from moejax.benching.show import Bench, Row

REPEATS = flags.DEFINE_integer("repeats", 5, "turns; more for a busy machine", 1)
FULL = flags.DEFINE_bool("full", False, "sweep all sizes and skews, and the model's depth")
ONLY = flags.DEFINE_list("only", [], "only these cases; 'step' is the training step")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of rows and weights")
PEERS = flags.DEFINE_bool("peers", True, "Hugging Face's block in PyTorch, where it is installed")
JSON = flags.DEFINE_string("json", None, "also write the figures here")
PLOT = flags.DEFINE_string("plot", None, "also draw the shares here, as PNG")
AGAINST = flags.DEFINE_string("against", None, "a saved run, shown beside this one")


def main(arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}")
    against = show.shares_of(Path(AGAINST.value)) if AGAINST.value else {}
    cases = [*CASES, *(sweep() if FULL.value else ())]
    names = {case.name for case in cases} | {"step"}
    for name in ONLY.value:
        if name not in names:
            raise ValueError(f"--only: no case {name!r}; there are: {', '.join(sorted(names))}")
    wanted = set(ONLY.value or names)
    machine, repeats = show.machine(DTYPE.value), REPEATS.value
    lines: list[Measured] = []
    for case in (case for case in cases if case.name in wanted):
        for both in (False, True) if case == SIXTEEN or FULL.value else (True,):
            lines += layer.measure(case, repeats, both, jnp.dtype(DTYPE.value))
        if PEERS.value:
            lines += peers.measure(case, repeats)
    whole, depths = None, {}
    if "step" in wanted:
        from moejax.benching import step  # here: the layer's benchmark needs no data stack

        whole = step.measure(repeats)
        depths = {n: step.compile_seconds(n) for n in step.DEPTHS if FULL.value}
    bench = Bench(machine, lines, budgets(lines), whole, depths)
    print(show.text(bench, against))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(show.to_json(bench), indent=1))
    if PLOT.value:
        show.plot(bench, Path(PLOT.value))
    return 0


def budgets(lines: list[Measured]) -> list[Row]:
    """What was measured beside what must be reached."""
    share = {(line.case, line.way): line.share for line in lines if line.both}

    def over(case: str, way: str, other: str) -> float | None:
        found = share.get((case, way)), share.get((case, other))
        return None if found[0] is None or found[1] is None else found[0] / found[1]

    large, eight, sixteen = LARGE.name, EIGHT.name, SIXTEEN.name
    overhead = over(large, "layer", "experts")
    wanted = [
        ("dropless / dense, uniform load", over(large, "dropless", "dense"), 0.9),
        ("dropless / dense, Zipf load", over("large, skewed", "dropless", "dense"), 0.7),
        ("dropless / dense, fine-grained", over("fine-grained", "dropless", "dense"), 0.9),
        ("dropless / lax.ragged_dot, E=8", over(eight, "dropless", "ragged_dot"), 5),
        ("gather / one-hot einsum, E=16", over(sixteen, "gather", "einsum"), 3),
    ]
    rows = [Row(what, r, f">= {least}", r >= least) for what, r, least in wanted if r is not None]
    if overhead is not None:
        lost = 1 - overhead
        rows.append(Row("router + dispatch + combine, share", lost, "<= 0.15", lost <= 0.15))
    return rows


if __name__ == "__main__":
    cli.run(main)
