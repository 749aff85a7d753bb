"""Train every variant of an experiment over seeds, then report.

    moejax compare experiments/routers.py:smoke

Several processes train each run together: the same command on each, as with `moejax train`. A
variant's run that is finished is not run again, one that was cut is resumed. Run some variants here
and some on another machine (--variants), then `moejax report DIR DIR ...` joins them.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from moejax import cli, meeting
from moejax.config import Config, override
from moejax.reporting import Suite, load, write_report

OUT = flags.DEFINE_string("out", None, "output folder; default runs/EXPERIMENT/SCALE")
VARIANTS = flags.DEFINE_list("variants", [], "only these variants")
SEEDS = flags.DEFINE_list("seeds", [], "these seeds instead of the experiment's")
flags.adopt_module_key_flags(meeting)


def main(arguments: list[str]) -> int:
    if arguments or "config" not in flags.FLAGS:
        raise ValueError("usage: moejax compare experiments/FILE.py:SCALE [--out=DIR]")
    path, _, scale = flags.FLAGS.experiment.partition(":")
    suite = load_suite(path, scale)
    if SEEDS.value:
        suite = dataclasses.replace(suite, seeds=parse_seeds(SEEDS.value))
    out = Path(OUT.value or f"runs/{suite.name}/{suite.scale}")
    configs = plan(suite, flags.FLAGS.config, VARIANTS.value)
    from moejax.sharding import check_batch, make_mesh
    from moejax.training.checkpoint import check_claim, claim
    from moejax.training.loop import Stopped
    from moejax.training.meter import NonFiniteLoss
    from moejax.training.processes import first

    meeting.meet()
    for name, config in configs.items():  # all of them, before the first is written
        check_batch(config.data.batch // config.train.accumulation, make_mesh(config.mesh))
        check_claim(out / name, config)
    waiting = unfinished(configs, out)
    for name, config in configs.items():
        first(claim, out / name, config)
    described = {**suite.to_json(), "experiment": f"{path}:{scale}"}
    described["command"] = f"moejax compare {path}:{scale}"
    first((out / "suite.json").write_text, json.dumps(described, indent=2))
    try:
        train_all(waiting, out)
    except Stopped as stop:
        first(print, f"{stop}; so does the comparison", file=sys.stderr)
        return 0
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    first(report, suite, out)
    return 0


def report(suite: Suite, out: Path) -> None:
    print(write_report(load(out), suite, out))
    print(f"report: {out / 'report.html'}")


def parse_seeds(words: list[str]) -> tuple[int, ...]:
    """The seeds of --seeds=0,1,2.

    Raises:
      ValueError: a word that is not a whole number from 0.
    """
    for word in words:
        if not word.isdecimal():
            raise ValueError(f"--seeds: {word!r} is not a seed; use whole numbers, as in 0,1,2")
    return tuple(int(word) for word in words)


def load_suite(path: str, scale: str) -> Suite:
    """The suite that an experiment file defines at a scale.

    Raises:
      ValueError: no such file, or a file without get_suite.
    """
    module = cli.load_experiment(path)
    if not hasattr(module, "get_suite"):
        raise ValueError(f"{path} has no get_suite(scale): it is a single run, for `moejax train`")
    return module.get_suite(scale)


def plan(suite: Suite, base: ConfigDict, only: list[str]) -> dict[str, Config]:
    """The checked configs of all runs by their folder, `VARIANT/seedK`, one seed of all variants
    first.

    Raises:
      ValueError: an unknown variant, or any variant whose config is wrong.
    """
    for name in only:
        if name not in suite.variants:
            raise ValueError(f"unknown variant {name!r}; known: {', '.join(suite.variants)}")
    return {
        f"{name}/seed{seed}": Config.from_dict(
            override(base, {**suite.variants[name], "train.seed": seed})
        )
        for seed in suite.seeds
        for name in (only or suite.variants)
    }


def unfinished(configs: dict[str, Config], out: Path) -> dict[str, Config]:
    """What is left to train. Here the processes meet: all have looked at the folder, none has
    written to it.

    Raises:
      ValueError: processes that were given different configs, or that see different folders.
    """
    from moejax.data.storage import digest
    from moejax.training.checkpoint import written_config
    from moejax.training.processes import check_agree

    finished = [name for name in configs if (out / name / "summary.json").exists()]
    wanted = digest({name: written_config(config) for name, config in configs.items()})
    check_agree(configs=wanted, finished=digest(finished))
    return {name: config for name, config in configs.items() if name not in finished}


def train_all(configs: dict[str, Config], out: Path) -> None:
    """Train them in order, with the time left for all."""
    from moejax.training.loop import train
    from moejax.training.processes import first

    started = time.perf_counter()
    for done, (name, config) in enumerate(configs.items()):
        seconds = time.perf_counter() - started
        left = f", {seconds / done * (len(configs) - done):.0f} s left in all" if done else ""
        line = f"[{done + 1}/{len(configs)}] {name}{left}"
        first(print, line, file=sys.stderr, flush=True)
        train(config, out / name, label=name)


if __name__ == "__main__":
    cli.run(main)
