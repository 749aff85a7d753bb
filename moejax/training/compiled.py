"""Compiled programs kept on disk: a run that is resumed, or repeated by another process, starts
without compiling again."""

import functools
import os
import platform
from pathlib import Path

import jax

from moejax import storage


def keep_compiled() -> None:
    """Let JAX keep what it compiles in `compiled/` of the data directory. To be called before it
    compiles anything. $JAX_COMPILATION_CACHE_DIR names another folder, or, empty, none.

    The folder may be deleted at any time. JAX tells programs of other versions, flags and
    accelerators apart; of CPUs it does not, so each kind has a folder of its own.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = storage.data_directory() / "compiled" / f"{platform.machine()}-{_instructions()}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # All of them: a run's log makes dozens of small ones, as long together as a training step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@functools.cache
def _instructions() -> str:
    """Stands for what this machine's CPU can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return storage.digest(platform.processor())
    flags = ("flags", "Features")  # of x86 and of ARM
    return storage.digest(next((line for line in lines if line.startswith(flags)), ""))
