"""Evaluate a run's checkpoint on held-out text: moejax evaluate WORKDIR [--step=N] [--rows=0]"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from moejax import cli
from moejax.config import Config

STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the newest")
ROWS = flags.DEFINE_integer("rows", 0, "validation sequences; 0 = all")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise ValueError("usage: moejax evaluate WORKDIR")
    workdir = Path(arguments[0])
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"{workdir} holds no run: there is no config.json")
    config = Config.from_dict(json.loads((workdir / "config.json").read_text()))
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, eval_rows=ROWS.value)
    )
    from moejax.data import open_dataset
    from moejax.training.checkpoint import Checkpoints
    from moejax.training.evaluate import evaluate
    from moejax.training.program import build_program

    dataset = open_dataset(config.data)
    program = build_program(config, dataset.vocab_size, len(dataset.domains), training=False)
    checkpoints = Checkpoints(workdir, read_only=True)
    state, _ = checkpoints.restore(program.abstract_state, STEP.value)
    checkpoints.close()
    record = evaluate(config, program, state, dataset)
    print(
        f"step {int(state.step)}: bits per byte {record['bpb']:.4f} on {record['tokens']:,} tokens"
    )
    for name, bpb in record["bpb_domain"].items():
        print(f"  {name:<12}{bpb:.4f}")
    if "max_vio_global" in record:
        print(
            f"MaxVio {record['max_vio_global']:.3f} (random routing: {record['max_vio_floor']:.3f})"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
