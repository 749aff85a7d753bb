"""Train one config: moejax train experiments/switch.py:smoke --workdir=/tmp/switch

After the ':' of an experiment file stands its scale; --config.KEY=VALUE overrides any of its keys.

Several processes train one run together: the same command on each. A TPU slice, a Kubernetes job
and Slurm tell them who they are; elsewhere --coordinator, --num_processes and --process_id do.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from moejax import cli, meeting
from moejax.config import Config

WORKDIR = flags.DEFINE_string(
    "workdir", None, "where checkpoints and metrics go; resumed if it is this run's"
)
flags.adopt_module_key_flags(meeting)


def main(arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}; overrides are --config.KEY=VALUE")
    if "config" not in flags.FLAGS or WORKDIR.value is None:
        raise ValueError("--config=experiments/FILE.py:SCALE and --workdir=DIR are needed")
    config = Config.from_dict(flags.FLAGS.config)
    from moejax.training.loop import Stopped, train  # here: a typo should not wait for JAX
    from moejax.training.meter import NonFiniteLoss
    from moejax.training.processes import first

    meeting.meet()
    try:
        summary = train(config, Path(WORKDIR.value))
    except Stopped as stop:
        first(print, stop, file=sys.stderr)
        return 0
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    first(_show, config, summary)
    return 0


def _show(config: Config, summary: dict[str, Any]) -> None:
    masked = "" if config.causal else "masked "
    domains = "  ".join(f"{n} {b:.4f}" for n, b in summary["eval"]["bpb_domain"].items())
    print(f"bits per {masked}byte {summary['bpb']:.4f}:  {domains}")
    print(f"{summary['step']} steps in {summary['seconds']:.0f} s, in {WORKDIR.value}")


if __name__ == "__main__":
    cli.run(main)
