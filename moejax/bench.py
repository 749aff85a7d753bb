"""The layer's speed beside a dense feed-forward network of equal active FLOPs: moejax bench

All that is compared is timed in turns in one process, after a warm-up. Ratios are medians over
turns: they survive a busy machine, single times do not. --full changes one size after the other: E,
K, D, F, T and the load's skew.
"""

from pathlib import Path

import jax.numpy as jnp
from absl import flags

from moejax import cli
from moejax.benching import layer, peers, show
from moejax.benching.budgets import layer_budgets, step_budgets
from moejax.benching.layer import Measured
from moejax.benching.shapes import CASES, SIXTEEN, sweep
from moejax.benching.show import Bench

REPEATS = flags.DEFINE_integer("repeats", 5, "turns; more for a busy machine", 1)
FULL = flags.DEFINE_bool("full", False, "also sweep sizes and skews, and the forward pass alone")
ONLY = flags.DEFINE_list("only", [], "only these cases; 'step' is the training step")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of rows and weights")
PEERS = flags.DEFINE_bool("peers", True, "Hugging Face's Mixtral in PyTorch, where installed")
OUT = flags.DEFINE_string("out", None, "also write figures, table and plot into this folder")
AGAINST = flags.DEFINE_string("against", None, "a saved run's JSON, shown beside this one")


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

        whole = step.measure(repeats, PEERS.value and peers.possible())
        depths = {layers: step.compile_seconds(layers) for layers in step.DEPTHS}
    bench = Bench(machine, lines, [*layer_budgets(lines), *step_budgets(whole)], whole, depths)
    print(show.text(bench, against))
    if OUT.value:
        show.write(bench, Path(OUT.value))
    return 0


if __name__ == "__main__":
    cli.run(main)
