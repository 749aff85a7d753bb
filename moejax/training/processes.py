"""Several processes, one run: every process calls the same functions at the same steps.

What a run computes, it computes on all of them; what it writes, `first` writes once; and what one
of them is told, `Told` makes known to all at the same step.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

A = ParamSpec("A")
R = TypeVar("R")

HEARTBEAT = 60  # seconds of silence after which a process counts as dead, and the others end
LEAVING = 15  # seconds that a process which is done, or has failed, waits for the others


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait: int = 300,
) -> None:
    """Meet the other processes of a run, if there are any. To be called before devices are used.

    Without arguments the cluster says who they are, as JAX finds it: a TPU slice (VMs or GKE), a
    Kubernetes job, Slurm's `srun`, Open MPI. A machine of its own is a run of one process.

    Args:
      coordinator: HOST:PORT where process 0 listens; the same for all.
      num_processes, process_id: how many there are, and which of them this is, from 0.
      wait: seconds to wait for all of them.

    Raises:
      ValueError: some of the three given and others not, an id out of range, or an address where
        nothing can listen. Where processes do not come, this one ends with exit code 2.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        there = ", ".join(f"--{k}={v}" for k, v in given.items() if v is not None)
        raise ValueError(f"{there} needs {', '.join(f'--{name}' for name in missing)} too")
    if missing and os.environ.get("SLURM_NTASKS") == "1":
        return  # a node of its own: JAX would use one of its GPUs only
    if not 0 <= (process_id or 0) < (num_processes or 1):
        raise ValueError(f"--process_id={process_id} is not one of --num_processes={num_processes}")
    # Its handler would swallow a SIGTERM that comes before training does: `Told` serves the rest.
    jax.config.update("jax_enable_preemption_service", False)
    whom = f"all of --num_processes={num_processes}" if num_processes else "all of the cluster's"
    late = f"not {whom} processes came to {coordinator or 'meet'} within --wait={wait} s"
    with _no_longer_than(wait, late):
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                cluster_detection_method=None if missing else "deactivate",
                initialization_timeout=wait + LEAVING,  # after ours: its own would abort
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=LEAVING,
            )
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
        except RuntimeError as error:
            if missing and "must be called before" in str(error):
                return  # JAX is in use already, as in a notebook: a process of its own
            raise ValueError(f"the processes did not meet: {error}") from error


@contextlib.contextmanager
def _no_longer_than(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with an error where the body, which may hang outside of Python, lasts."""

    def end() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_agree(**values: str) -> None:
    """Raises ValueError where a process has another value, such as another config."""
    for name, value in values.items():
        mine = np.frombuffer(value.encode(), np.uint8)
        texts = [bytes(row).decode() for row in _gathered(mine)]
        for process, text in enumerate(texts):
            if text != texts[0]:
                raise ValueError(
                    f"process {process} of {len(texts)} has {name} {text}, process 0 has "
                    f"{texts[0]}; all must have the same"
                )


def _gathered(a: np.ndarray) -> np.ndarray:
    """The arrays of all processes, stacked."""
    return np.asarray(multihost_utils.process_allgather(a)).reshape(-1, *a.shape)


def first(function: Callable[A, R], *args: A.args, **kwargs: A.kwargs) -> R:
    """function(...) on the first process: the only one that writes. Elsewhere a `Silent`."""
    if jax.process_index() == 0:
        return function(*args, **kwargs)
    silent: Any = Silent()
    return silent


def meet() -> None:
    """Wait until all processes have come here: what the first has written by then, all can read."""
    multihost_utils.sync_global_devices("moejax")


class Silent:
    """Stands for what the first process writes with: takes any call, does nothing, is false."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __bool__(self) -> bool:
        return False


class Told:
    """Whether any process was told to stop; all of them learn it at the same step.

    One tiny sum over all devices a step, read one step later, so that nothing waits for it.
    """

    def __init__(self) -> None:
        mesh = Mesh(np.array(jax.devices()), ("device",))
        self._cut = NamedSharding(mesh, P("device"))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._pending: jax.Array | None = None

    def __call__(self, here: bool) -> bool:
        """here: this process was told. Every process must ask, once a step."""
        if jax.process_count() == 1:
            return here
        mine = np.full(jax.local_device_count(), here)
        flags = jax.make_array_from_process_local_data(self._cut, mine)
        before, self._pending = self._pending, self._any(flags)
        return before is not None and bool(before)
