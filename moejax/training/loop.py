"""The loop: data, step, log, evaluate, save. Everything interesting is in `step.py`."""

import contextlib
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from moejax.config import Config
from moejax.data import TextDataset, open_dataset
from moejax.sharding import check_batch, make_mesh
from moejax.storage import digest
from moejax.training import settling
from moejax.training.ablate import without
from moejax.training.checkpoint import (
    Checkpoints,
    check_claim,
    claim,
    has_checkpoint,
    written_config,
)
from moejax.training.evaluate import evaluate
from moejax.training.hardware import device_name, peak_flops
from moejax.training.meter import Meter
from moejax.training.optimizer import make_schedule
from moejax.training.processes import Told, check_agree, first
from moejax.training.program import Program, build_program
from moejax.training.recording import Recorder, Recording, ReplayBatch
from moejax.training.records import Progress, Records, read_records
from moejax.training.state import TrainState
from moejax.training.upcycle import check_upcycle, dense_config, load_dense, upcycle_state

_LEAK = (
    "routing by {} with moe.groups={!r} lets a token's output depend on later tokens of its "
    "sequence: the training loss counts on what a decoder does not have; `moejax routers "
    "--causality` shows which routing does not"
)


class Stopped(Exception):
    """SIGTERM or SIGINT: the run saved its state and can be resumed by the same command."""


def train(
    config: Config, workdir: Path, *, label: str = "step", quiet: bool = False
) -> dict[str, Any]:
    """Train a config to its last step in `workdir`, from its newest checkpoint if there is one.

    Where there are several processes, all of them call this, with one `workdir` that all see.

    Returns:
      The contents of summary.json; {} on a process that does not write.

    Raises:
      ValueError: a workdir of another run, a mesh or batch that does not fit, or processes that
        were given different runs.
      NonFiniteLoss: the loss is NaN or infinite.
      Stopped: after SIGTERM or SIGINT, with everything saved.
    """
    started = time.perf_counter()
    workdir = Path(workdir)
    progress = first(Progress, label, config.train.steps, quiet)
    # These refuse before data is prepared, which may take a minute.
    make_schedule(config.optimizer, config.train.steps)
    check_batch(config.data.batch // config.train.accumulation, make_mesh(config.mesh))
    check_claim(workdir, config)
    if config.train.upcycle and not has_checkpoint(workdir):
        check_upcycle(dense_config(Path(config.train.upcycle)), config)
    recording = open_recording(config)
    dataset = open_dataset(config.data, progress=not quiet)
    check_same_data(workdir, dataset)
    if recording is not None:
        recording.check_text(dataset.fingerprint)
    # Here they meet: before, all have looked at the folder, and none has written to it.
    check_agree(config=digest(written_config(config)), text=dataset.fingerprint)
    width = 0 if recording is None else recording.width
    program = build_program(config, dataset.vocab_size, len(dataset.domains), None, width)
    first(claim, workdir, config)  # a config that does not fit the machine leaves nothing behind
    first(_warn_of_leaks, config, progress)
    run = _Run(config, workdir, dataset, program, progress, recording)
    try:
        with _interruptible() as interrupted:
            run.loop(interrupted)
    finally:
        run.close()
    return first(run.finish, time.perf_counter() - started) or {}


def _warn_of_leaks(config: Config, progress: Progress) -> None:
    if config.leaks:
        progress.say(f"warning: {_LEAK.format(config.router.label, config.moe.groups)}")


class _Run:
    """One attempt at a run: its state, and the files it writes."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        dataset: TextDataset,
        program: Program,
        progress: Progress,
        recording: Recording | None = None,
    ) -> None:
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.program, self.progress = program, progress
        self.checkpoints = Checkpoints(workdir, config.train.keep)
        saved: dict[str, Any] = {"bpb": None, "meter": {}}
        if self.checkpoints.latest is None:
            self.state = self.first_state()
        else:
            self.state, saved = self.checkpoints.restore(program.abstract_state)
            progress.say(f"resumed from step {int(self.state.step)}")
        self.bpb: float | None = saved["bpb"]
        self.records = first(Records, workdir, int(self.state.step))
        # A replayed run reads the recorded run's rows; all else of it has its own seed.
        self.recording = recording
        self.seed = config.train.seed if recording is None else recording.seed
        self.recorder = None
        if config.train.trace_every:
            step = int(self.state.step)
            self.recorder = first(Recorder, workdir, config, dataset, self.seed, step)
        tokens = config.data.batch * config.data.sequence
        self.meter = Meter(tokens, tokens * program.size.flops, peak_flops(), saved["meter"])
        self.schedule = make_schedule(config.optimizer, config.train.steps)
        first(_write_provenance, workdir, config, dataset, program)

    def first_state(self) -> TrainState:
        """At step 0, or as the dense run that `train.upcycle` names left it."""
        config, program = self.config, self.program
        fresh = program.init(config.train.seed, self.dataset.count_V)
        if not config.train.upcycle:
            return fresh
        workdir = Path(config.train.upcycle)
        dense, old = load_dense(workdir, self.dataset.vocab_size, program.mesh)
        self.progress.say(f"experts from step {int(dense.step)} of {workdir}")
        if config.train.upcycle_step and int(dense.step) >= config.train.steps:
            raise ValueError(
                f"train.upcycle_step: the dense run is at step {int(dense.step)} already; raise "
                f"train.steps={config.train.steps}"
            )
        where = jax.tree.map(lambda a: a.sharding, program.abstract_state)
        make = functools.partial(upcycle_state, old=old, new=config)
        return jax.jit(make, out_shardings=where)(dense, fresh)

    def loop(self, interrupted: list[int]) -> None:
        every, last = self.config.train, self.config.train.steps
        start, rows, told = int(self.state.step) + 1, self.program.rows, Told()
        batches = self.dataset.train_batches(int(self.state.position), seed=self.seed, share=rows)
        for step, (batch, position) in zip(range(start, last + 1), batches, strict=False):
            given: Any = batch
            if self.recording is not None:
                there = self.recording.step(step, position, rows, batch.valid_BS)
                given = ReplayBatch(*batch, there)
            self.state, metrics = self.program.train_step(self.state, self.program.put(given))
            if self.recorder is not None:
                self.recorder.add(step, position, metrics.pop("traced"))
            self.log(self.meter.push(step, position, metrics))
            if _due(step, every.eval_every, last):
                self.evaluate(step)
            stop = told(bool(interrupted))
            if _due(step, every.checkpoint_every, last) or stop:
                self.save()
            if stop and step < last:
                raise Stopped(f"saved at step {step} of {last}; the same command resumes")

    def log(self, step: int | None) -> None:
        """Write the record of a step whose metrics have arrived, if it is due."""
        config, schedule = self.config, self.schedule
        if step is None or not _due(step, config.train.log_every, config.train.steps):
            return
        record = self.meter.record(step, float(schedule(step - 1)))
        self.records.write(record)
        left = self.meter.seconds / step * (config.train.steps - step)
        self.progress.show(record, left)
        if config.moe.experts:
            share, experts = config.train.collapse_share, config.moe.experts
            if message := self.meter.alarm(record, share, config.choices, experts):
                self.records.write({"kind": "alarm", "step": step, "message": message})
                self.progress.say(f"warning: {message}")

    def evaluate(self, step: int) -> None:
        self.log(self.meter.flush())
        record = evaluate(self.config, self.program, self.state, self.dataset)
        if self.config.train.eval_without and step == self.config.train.steps:
            record |= without(self.config, self.program, self.state, self.dataset)
        traced = record.pop("traced", None)
        self.bpb = record["bpb"]
        self.records.write({"kind": "eval", "step": step, "seconds": self.meter.seconds, **record})
        if traced is not None:
            first(settling.keep, self.workdir, step, traced)
            if step == self.config.train.steps:
                self.records.show_saturation(first(settling.saturation, self.workdir))

    def save(self) -> None:
        self.log(self.meter.flush())  # a loss that is not finite stops here, before it is saved
        if self.recorder is not None:
            self.recorder.flush()
        progress = {"bpb": self.bpb, "meter": self.meter.carried()}
        self.checkpoints.save(self.state, progress, self.bpb)

    def close(self) -> None:
        self.checkpoints.close()
        self.records.close()

    def finish(self, wall_seconds: float) -> dict[str, Any]:
        records = read_records(self.workdir / "metrics.jsonl")
        steps = self.config.train.steps
        tail = [r for r in records if r["kind"] == "train" and r["step"] > 0.9 * steps]
        summary = {
            "step": steps,
            "seconds": self.meter.seconds,
            "bpb": self.bpb,
            "eval": [r for r in records if r["kind"] == "eval"][-1],
            "train": _mean(tail),
            "compile_seconds": self.program.compile_seconds,
            "wall_seconds": wall_seconds,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if settled := settling.saturation(self.workdir):
            summary["saturation"] = settled
        _write_json(self.workdir / "summary.json", summary)
        return summary


def open_recording(config: Config) -> Recording | None:
    """The routing that `train.replay` names; None for most runs.

    Raises:
      ValueError: the router `replay` without a recording, or one that does not fit the config.
    """
    if not config.train.replay:
        if config.moe.experts and config.router.name == "replay":
            raise ValueError(
                "router.name='replay' needs train.replay, the folder of a recorded run"
            )
        return None
    recording = Recording(Path(config.train.replay))
    recording.check(config)
    return recording


def check_same_data(workdir: Path, dataset: TextDataset) -> None:
    """Raises ValueError where the run in a working directory was trained on other text."""
    path = workdir / "run.json"
    there = json.loads(path.read_text())["data"]["fingerprint"] if path.exists() else None
    if there not in (None, dataset.fingerprint):
        raise ValueError(
            f"{workdir} was trained on text of fingerprint {there}, this machine's corpus has "
            f"{dataset.fingerprint}; choose another --workdir, or bring the run's own corpus"
        )


def _write_provenance(
    workdir: Path, config: Config, dataset: TextDataset, program: Program
) -> None:
    _write_json(workdir / "run.json", provenance(config, dataset, program))


def provenance(config: Config, dataset: TextDataset, program: Program) -> dict[str, Any]:
    """What a result must be read with: sizes, versions, device, commit, data."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "params": {"total": program.size.total, "active": program.size.active},
        "flops_per_token": program.size.flops,
        "moe_layers": config.moe_layers,
        "leaks": config.leaks,
        "tokens_per_step": config.data.batch * config.data.sequence,
        "versions": {
            "python": sys.version.split()[0],
            "moejax": metadata.version("moejax") if _installed("moejax") else "source",
            **{name: metadata.version(name) for name in packages},
        },
        "device": device_name(),
        "processes": jax.process_count(),
        "commit": source_commit(),
        "data": {
            "name": config.data.name,
            "fingerprint": dataset.fingerprint,
            "domains": list(dataset.domains),
            "sizes": dataset.sizes,
        },
    }


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append to; the second one of either kills as usual."""
    received: list[int] = []

    def handler(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, handler)
    except ValueError:  # not the main thread (a notebook's kernel): no signals there
        yield received
        return
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _mean(records: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = [k for k, v in records[-1].items() if isinstance(v, int | float) and k != "step"]
    return {key: sum(r[key] for r in records) / len(records) for key in numbers}


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2))
    partial.replace(path)


def _installed(package: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(package))
    return False


def source_commit() -> str:
    """The source's git commit, '+' where the tree has changes. Outside a checkout, what
    $MOEJAX_COMMIT says that the copy was taken from, else 'unknown'."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MOEJAX_COMMIT", "unknown")
