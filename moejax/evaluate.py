"""Evaluate a run's checkpoint on held-out text: moejax evaluate WORKDIR [--step=N] [--rows=0]
[--trace=DIR]"""

import dataclasses
from pathlib import Path

from absl import flags

from moejax import cli

STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the newest")
ROWS = flags.DEFINE_integer("rows", 0, "validation sequences; 0 = all")
TRACE = flags.DEFINE_string("trace", None, "a folder for the trace of its routing")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise ValueError("usage: moejax evaluate WORKDIR")
    workdir = Path(arguments[0])
    from moejax.training.evaluate import evaluate
    from moejax.training.recording import trace_meta
    from moejax.training.saved import open_run, read_config
    from moejax.training.traced import validation_batches, write_trace

    config = read_config(workdir)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, eval_rows=ROWS.value)
    )
    run = open_run(workdir, STEP.value, config=config)
    if TRACE.value:
        trace_meta(config, run.dataset)  # refuses a model without experts before it computes
    record = evaluate(config, run.program, run.state, run.dataset)
    step = int(run.state.step)
    masked = "" if config.causal else "masked "
    print(f"step {step}: bits per {masked}byte {record['bpb']:.4f} on {record['targets']:,} tokens")
    for name, bpb in record["bpb_domain"].items():
        print(f"  {name:<12}{bpb:.4f}")
    if "max_vio_global" in record:
        print(
            f"MaxVio {record['max_vio_global']:.3f} (random routing: {record['max_vio_floor']:.3f})"
        )
    if TRACE.value:
        tokens = write_trace(run, validation_batches(run, ROWS.value), Path(TRACE.value))
        print(f"trace of {tokens:,} tokens: {TRACE.value}")
    return 0


if __name__ == "__main__":
    cli.run(main)
