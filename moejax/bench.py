"""The layer's speed beside a dense feed-forward network of equal active FLOPs: moejax bench

All that is compared is timed in turns in one process, after a warm-up. Ratios are medians over
turns: they survive a busy machine, single times do not. --full changes one size after the other: E,
K, D, F, T and the load's skew. On a GPU the sizes are published ones, by each grouped product that
there is; PyTorch shares its memory, so JAX must not take all of it beforehand:

    XLA_PYTHON_CLIENT_PREALLOCATE=false moejax bench --dtype=bfloat16 --out=FOLDER
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from moejax import cli
from moejax.benching import layer, peers, show
from moejax.benching.budgets import layer_budgets, step_budgets
from moejax.benching.shapes import narrowed, passes, wanted
from moejax.benching.show import Bench

REPEATS = flags.DEFINE_integer("repeats", 5, "turns; more for a busy machine", 1)
FULL = flags.DEFINE_bool("full", False, "also sweep sizes and skews, and the forward pass alone")
ONLY = flags.DEFINE_list("only", [], "only these cases; 'step' is the training step")
WAYS = flags.DEFINE_list("ways", [], "of each case only these lines, beside dense and peers")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of rows and weights")
PEERS = flags.DEFINE_bool("peers", True, "PyTorch's too, where installed")
OUT = flags.DEFINE_string("out", None, "also write figures, table and plot into this folder")
AGAINST = flags.DEFINE_string("against", None, "a saved run's JSON, shown beside this one")


def main(arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}")
    against = show.shares_of(Path(AGAINST.value)) if AGAINST.value else {}
    cases, with_step = wanted(ONLY.value, FULL.value, jax.default_backend() == "gpu")
    cases = narrowed(cases, WAYS.value)
    bench = Bench(show.machine(DTYPE.value, cases))
    for case, both in passes(cases, FULL.value):
        theirs = peers.runs(case, both, DTYPE.value) if PEERS.value else {}
        lines, failed = layer.measure(case, REPEATS.value, both, jnp.dtype(DTYPE.value), theirs)
        bench = bench._replace(lines=[*bench.lines, *lines], failed=[*bench.failed, *failed])
        bench = bench._replace(budgets=layer_budgets(bench.lines))
        if OUT.value:  # after each: what is cut off keeps what it has
            show.write(bench, Path(OUT.value))
    if with_step:
        from moejax.benching import step  # here: the layer's benchmark needs no data stack

        whole = step.measure(REPEATS.value, PEERS.value and peers.possible())
        depths = {layers: step.compile_seconds(layers) for layers in step.DEPTHS}
        budgets = [*bench.budgets, *step_budgets(whole)]
        bench = bench._replace(step=whole, depths=depths, budgets=budgets)
        if OUT.value:
            show.write(bench, Path(OUT.value))
    print(show.text(bench, against))
    return 0


if __name__ == "__main__":
    cli.run(main)
