"""Checkpoints: orbax, asynchronous and atomic, restored onto whatever mesh the run has now."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from moejax.config import Config
from moejax.config.older import modern
from moejax.routing import RouterSpec
from moejax.training.state import TrainState

# Keys that may change between two attempts at one run: they do not touch the numbers.
_FREE = {
    f"train.{name}" for name in ("log_every", "eval_every", "eval_rows", "checkpoint_every", "keep")
} | {"data.data_dir", "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor"}


class Checkpoints:
    """The checkpoints of one working directory: the newest few, and the best by bits per byte.

    A save returns at once and is written in the background; a checkpoint that was being written
    when the process died is not there at all.
    """

    def __init__(self, workdir: Path, newest: int = 2, *, read_only: bool = False) -> None:
        """newest: how many to keep; read_only: leave the folder as it is, a run may be writing
        there."""
        self._directory = workdir / "checkpoints"
        if read_only and not self._directory.is_dir():
            raise FileNotFoundError(
                f"no checkpoint in {self._directory}: the run has saved none yet"
            )
        best = keep.BestN(
            get_metric_fn=_bpb, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        with _without_warnings(read_only):
            self._manager = ocp.CheckpointManager(
                self._directory.absolute(),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(newest), best]),
                    cleanup_tmp_directories=not read_only,
                    create=not read_only,
                    read_only=read_only,
                ),
                # Named here, because a new process could not tell what it finds otherwise.
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "progress": ocp.JsonCheckpointHandler(),
                },
            )

    @property
    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: dict[str, Any], bpb: float | None) -> None:
        """Save the state of `state.step`.

        Args:
          state: copied before this returns, so its buffers may be donated afterwards.
          progress: plain values that go with it, such as the seconds trained.
          bpb: the last validation bits per byte, by which the best one is kept.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()), progress=ocp.args.JsonSave(progress)
            ),
            metrics=None if bpb is None else {"bpb": bpb},
            force=True,
        )

    def restore(
        self, like: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and progress of a step (default: the newest), bit for bit.

        Args:
          like: ShapeDtypeStructs with shardings: where each array goes.
          step: an optimizer step.

        Raises:
          FileNotFoundError: no checkpoint there, with the steps that are.
          ValueError: the checkpoint is of a model of other sizes.
        """
        steps = self.steps
        if step is None and steps:
            step = steps[-1]
        if step is None or step not in steps:
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self._directory}; there are: {steps or 'none'}"
            )
        self._check_sizes(step, like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like._asdict()), progress=ocp.args.JsonRestore()
            ),
        )
        return TrainState(**restored["state"]), restored["progress"]

    def _check_sizes(self, step: int, like: TrainState) -> None:
        saved = self._manager.item_metadata(step)["state"]
        found = {_path(path): tuple(leaf.shape) for path, leaf in _leaves(saved)}
        wanted = {_path(path): tuple(leaf.shape) for path, leaf in _leaves(like._asdict())}
        for path in sorted({*found, *wanted}):
            if found.get(path) != wanted.get(path):
                raise ValueError(
                    f"checkpoint {self._directory}/{step} is of another model: {path} has shape "
                    f"{found.get(path)}, this config needs {wanted.get(path)}; use its own "
                    "config.json"
                )

    def close(self) -> None:
        """Wait for the save under way and release the directory."""
        self._manager.wait_until_finished()
        self._manager.close()


@contextlib.contextmanager
def _without_warnings(read_only: bool) -> Iterator[None]:
    """Orbax warns of a directory that is read only, where that was asked for."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR if read_only else before)
    try:
        yield
    finally:
        logger.setLevel(before)


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run in this folder has saved anything: without it, the run starts from step 0."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def check_claim(workdir: Path, config: Config) -> None:
    """Look whether a working directory is free or already this config's. Writes nothing.

    Raises:
      ValueError: it is a file, it holds something else, or a run of another config.
    """
    path = workdir / "config.json"
    if path.exists():
        _check_same(path, config)
    elif workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file; choose another --workdir")
    elif workdir.exists() and any(workdir.iterdir()):
        raise ValueError(
            f"{workdir} is not empty and holds no run of moejax; choose another --workdir"
        )


def claim(workdir: Path, config: Config) -> None:
    """Make a working directory this config's, unless it already is.

    Raises:
      ValueError: as `check_claim`; nothing is written then.
    """
    check_claim(workdir, config)
    path = workdir / "config.json"
    if path.exists():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(written_config(config), indent=2))
    partial.replace(path)


def written_config(config: Config) -> dict[str, Any]:
    """A config as config.json holds it: plain values, functions by their names."""
    tree = config.to_dict()
    if isinstance(tree["router"]["name"], RouterSpec):  # a tuple, which JSON would take apart
        tree["router"]["name"] = tree["router"]["name"].route
    return json.loads(json.dumps(tree, default=_function_name))


def _check_same(path: Path, config: Config) -> None:
    try:
        there = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); choose another --workdir") from error
    if difference := differs(there, config):
        raise ValueError(
            f"{path.parent} holds a run with {difference}; choose another --workdir, or the old "
            "value to resume it"
        )


def differs(written: dict[str, Any], config: Config) -> str:
    """In what a run's written config is another one: "KEY=VALUE, this one has KEY=VALUE"; '' where
    it is the same run."""
    there, here = _flat(modern(written)), _flat(written_config(config))
    # A run older than a key has that key's default.
    defaults = _flat(written_config(Config()))
    there |= {key: defaults[key] for key in here if key not in there and key in defaults}
    for key in sorted({*there, *here} - _FREE):
        if there.get(key) != here.get(key):
            return f"{key}={there.get(key)}, this one has {key}={here.get(key)}"
    return ""


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _function_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _bpb(metrics: Any) -> float:
    return metrics["bpb"]


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree.leaves_with_path(tree)


def _path(path: Any) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
