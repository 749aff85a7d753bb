"""Train every variant of an experiment over seeds, then report.

    moejax compare experiments/routers.py:smoke

Several processes train each run together: the same command on each, as with `moejax train`. A
variant's run that is finished is not run again, one that was cut is resumed. Run some variants here
and some on another machine (--variants), then `moejax report DIR DIR ...` joins them; or let the
second machine have the first one's report (--have=DIR), whose runs are finished for it too: so a
comparison of many hours is done in parts, from committed reports alone.

With --learning_rates=0.5,1,2 each variant is first trained at each of these shares of its learning
rate, on a seed of its own, and keeps the one of the lowest training loss.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from moejax import cli, meeting
from moejax.config import Config, override
from moejax.reporting import Results, Suite, load, write_report

if TYPE_CHECKING:
    from moejax.training.pace import Pace

OUT = flags.DEFINE_string("out", None, "output folder; default runs/EXPERIMENT/SCALE")
VARIANTS = flags.DEFINE_list("variants", [], "only these variants")
SEEDS = flags.DEFINE_list("seeds", [], "these seeds instead of the experiment's")
RATES = flags.DEFINE_list("learning_rates", [], "learning rates to try, in shares of each arm's")
HAVE = flags.DEFINE_list("have", [], "reports of a part of this comparison: not run again")
NOTE = flags.DEFINE_string("note", "", "a remark for the report, e.g. cores shared with other jobs")
flags.adopt_module_key_flags(meeting)
TRIALS = "learning_rates"  # their folder below the output folder


def main(arguments: list[str]) -> int:
    if arguments or "config" not in flags.FLAGS:
        raise ValueError("usage: moejax compare experiments/FILE.py:SCALE [--out=DIR]")
    path, _, scale = flags.FLAGS.experiment.partition(":")
    suite = load_suite(path, scale)
    if SEEDS.value:
        suite = dataclasses.replace(suite, seeds=parse_seeds(SEEDS.value))
    out = Path(OUT.value or f"runs/{suite.name}/{suite.scale}")
    base, factors = flags.FLAGS.config, parse_factors(RATES.value)
    configs = upcycled(plan(suite, base, VARIANTS.value), suite, out)
    trials = plan_trials(suite, base, VARIANTS.value, factors) if factors else {}
    have = load(*HAVE.value) if HAVE.value else None
    rates: dict[str, Any] = {}
    if have is not None:
        rates = have.suite.get("learning_rates", {}) if factors else {}
        trials = {name: c for name, c in trials.items() if name.split("/")[1] not in rates}
    from moejax.training.loop import Stopped
    from moejax.training.meter import NonFiniteLoss
    from moejax.training.pace import Pace
    from moejax.training.processes import first, meet

    meeting.meet()
    described = {**suite.to_json(), "experiment": f"{path}:{scale}"}
    described["command"] = " ".join(["moejax compare", f"{path}:{scale}", *changes(sys.argv)])
    described["note"] = NOTE.value
    waiting, pace = claim_all(trials, out) if trials else {}, Pace()
    try:
        if trials:
            train_all(waiting, out, pace, unseen(configs, out, have), may_diverge=True)
            meet()  # the last summary is written
            rates |= best_rates(trials, out)
        if rates:
            described["learning_rates"] = rates
            configs = {name: at_rate(c, rates[name.split("/")[0]]) for name, c in configs.items()}
        waiting = claim_all(lacking(configs, have), out)
        first(describe, out, described)
        train_all(waiting, out, pace)
    except Stopped as stop:
        first(print, f"{stop}; so does the comparison", file=sys.stderr)
        return 0
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    first(report, suite, out, HAVE.value)
    return 0


def describe(out: Path, suite: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)  # --have may hold every run
    (out / "suite.json").write_text(json.dumps(suite, indent=2))


def report(suite: Suite, out: Path, have: list[str]) -> None:
    print(write_report(load(out, *have), suite, out))
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


def parse_factors(words: list[str]) -> tuple[float, ...]:
    """The factors of --learning_rates=0.5,1,2.

    Raises:
      ValueError: a word that is no number above 0, or one that is there twice.
    """
    factors = []
    for word in words:
        try:
            factors.append(float(word))
        except ValueError:
            factors.append(0.0)
        if not 0 < factors[-1] < math.inf or factors.index(factors[-1]) < len(factors) - 1:
            raise ValueError(
                f"--learning_rates: {word!r} is no other share of a learning rate; use different "
                "numbers above 0, as in 0.5,1,2"
            )
    return tuple(factors)


def changes(argv: list[str]) -> list[str]:
    """The arguments that change what is trained, for the record."""
    kinds = ("config.", "seeds", "learning_rates")
    return [a for a in argv[1:] if a.startswith("-") and a.lstrip("-").startswith(kinds)]


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


def upcycled(configs: dict[str, Config], suite: Suite, out: Path) -> dict[str, Config]:
    """With train.upcycle, where it names a variant, as the folder of that variant's run of the same
    seed."""

    def linked(name: str, config: Config) -> Config:
        if config.train.upcycle not in suite.variants:
            return config
        folder = str(out / config.train.upcycle / name.split("/")[1])
        return dataclasses.replace(config, train=dataclasses.replace(config.train, upcycle=folder))

    return {name: linked(name, config) for name, config in configs.items()}


def plan_trials(
    suite: Suite, base: ConfigDict, only: list[str], factors: tuple[float, ...]
) -> dict[str, Config]:
    """The runs that choose learning rates, by `learning_rates/VARIANT/xFACTOR`: one seed that the
    comparison does not use.

    Raises:
      ValueError: as `plan`, or arms that start from other arms.
    """
    if any("train.upcycle" in changes for changes in suite.variants.values()):
        raise ValueError(
            f"--learning_rates: {suite.name} has arms that start from other arms, which are not "
            "trained at the trials' seed; tune them one by one"
        )
    own = dataclasses.replace(suite, seeds=(max(suite.seeds) + 1,))
    return {
        f"{TRIALS}/{name.split('/')[0]}/x{factor:g}": at_rate(config, {"best": factor})
        for name, config in plan(own, base, only).items()
        for factor in factors
    }


def lacking(configs: Mapping[str, Config], have: Results | None) -> dict[str, Config]:
    """The runs that earlier reports do not hold.

    Raises:
      ValueError: one that they hold was another run, or arms start from other arms.
    """
    if have is None:
        return dict(configs)
    from moejax.training.checkpoint import differs

    there = {run.name: run.config for run in have.runs}
    for name, config in configs.items():
        if config.train.upcycle:
            raise ValueError(
                f"--have: {name} starts from another arm's weights, which a report does not hold; "
                "carry on in the folder of its runs (--out)"
            )
        if name in there and (difference := differs(there[name], config)):
            raise ValueError(f"--have: {name} was a run with {difference}")
    return {name: config for name, config in configs.items() if name not in there}


def unseen(configs: Mapping[str, Config], out: Path, have: Results | None) -> list[Config]:
    """Those that neither the folder nor earlier reports hold, at whatever learning rate."""
    there = {run.name for run in have.runs} if have is not None else set()
    return [
        config
        for name, config in configs.items()
        if name not in there and not (out / name / "summary.json").exists()
    ]


def at_rate(config: Config, rate: Mapping[str, Any]) -> Config:
    """The config at rate["best"] times its learning rate."""
    own = config.optimizer
    scaled = dataclasses.replace(own, learning_rate=rate["best"] * own.learning_rate)
    return dataclasses.replace(config, optimizer=scaled)


def best_rates(trials: Mapping[str, Config], out: Path) -> dict[str, dict[str, Any]]:
    """By variant: the training loss at each factor (nats, mean of the last tenth), and the best
    factor. The text is read once, so the loss is that of text not seen before, yet not that of the
    evaluation text.

    Raises:
      ValueError: a variant that diverged at all of them.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in trials:
        _, variant, factor = name.split("/")
        path = out / name / "summary.json"  # none: it diverged
        loss = json.loads(path.read_text())["train"]["loss"] if path.exists() else None
        found.setdefault(variant, {"loss": {}})["loss"][factor.removeprefix("x")] = loss
    for variant, rates in found.items():
        finite = {factor: loss for factor, loss in rates["loss"].items() if loss is not None}
        if not finite:
            raise ValueError(f"{variant} diverged at all of --learning_rates; add smaller ones")
        rates["best"] = float(min(finite, key=finite.__getitem__))
    return found


def claim_all(configs: Mapping[str, Config], out: Path) -> dict[str, Config]:
    """Make every run's folder its own; all are looked at before the first is written.

    Raises:
      ValueError: a batch that does not fit the devices, or a folder of another run.
    """
    from moejax.sharding import check_batch, make_mesh
    from moejax.training.checkpoint import check_claim, claim
    from moejax.training.processes import first

    for name, config in configs.items():
        check_batch(config.data.batch // config.train.accumulation, make_mesh(config.mesh))
        check_claim(out / name, config)
    waiting = unfinished(configs, out)
    for name, config in configs.items():
        first(claim, out / name, config)
    return waiting


def unfinished(configs: Mapping[str, Config], out: Path) -> dict[str, Config]:
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


def train_all(
    configs: Mapping[str, Config],
    out: Path,
    pace: "Pace",
    later: Iterable[Config] = (),
    may_diverge: bool = False,
) -> None:
    """Train them in order, and say how long they and those that come `later` will still take."""
    from moejax.training.loop import train
    from moejax.training.meter import NonFiniteLoss
    from moejax.training.processes import first

    left = [*configs.values(), *later]
    for done, (name, config) in enumerate(configs.items()):
        seconds = pace.left(left[done:])
        told = "" if seconds is None else f", {seconds:.0f} s left in all"
        line = f"[{done + 1}/{len(configs)}] {name}{told}"
        first(print, line, file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            summary = train(config, out / name, label=name)
        except NonFiniteLoss:
            if not may_diverge:
                raise
        else:
            if summary:  # of the process that writes, and speaks
                pace.took(config, time.perf_counter() - started, summary["seconds"])


if __name__ == "__main__":
    cli.run(main)
