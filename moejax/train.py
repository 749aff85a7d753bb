"""Train one config: moejax train experiments/switch.py:smoke --workdir=/tmp/switch

After the ':' of an experiment file stands its scale; --config.KEY=VALUE overrides any of its keys.
"""

import sys
from pathlib import Path

from absl import flags

from moejax import cli
from moejax.config import Config

WORKDIR = flags.DEFINE_string(
    "workdir", None, "where checkpoints and metrics go; resumed if it is this run's"
)


def main(arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}; overrides are --config.KEY=VALUE")
    if "config" not in flags.FLAGS or WORKDIR.value is None:
        raise ValueError("--config=experiments/FILE.py:SCALE and --workdir=DIR are needed")
    config = Config.from_dict(flags.FLAGS.config)
    from moejax.training.loop import Stopped, train  # here: a typo should not wait for JAX
    from moejax.training.meter import NonFiniteLoss

    try:
        summary = train(config, Path(WORKDIR.value))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 0
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    domains = summary["eval"]["bpb_domain"].items()
    print(f"bits per byte {summary['bpb']:.4f}:  " + "  ".join(f"{n} {b:.4f}" for n, b in domains))
    print(f"{summary['step']} steps in {summary['seconds']:.0f} s, in {WORKDIR.value}")
    return 0


if __name__ == "__main__":
    cli.run(main)
