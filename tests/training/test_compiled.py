"""What is compiled stays on disk, for the next process."""

import os
import subprocess
import sys

import pytest

from tests import tiny

# Prints where programs are kept, and how many of the second compilation came from there.
COMPILE_TWICE = """
import jax, jax.monitoring
from moejax.training.compiled import keep_compiled
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
keep_compiled()
jax.jit(lambda x: 2 * x + 1)(3.0)
jax.clear_caches()
found.clear()
jax.jit(lambda x: 2 * x + 1)(3.0)
print(jax.config.jax_compilation_cache_dir, sum("cache_hits" in event for event in found))
"""


@pytest.mark.parametrize(("chosen", "hits"), [(None, 1), ("mine", 1), ("", 0)])
def test_compiled_programs_are_kept_where_the_user_wants_them(chosen, hits, tmp_path):
    environment = {**os.environ, "MOEJAX_DATA_DIR": str(tmp_path / "data")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    if chosen is not None:
        folder = chosen and str(tmp_path / chosen)
        environment |= {"JAX_COMPILATION_CACHE_DIR": folder}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_TWICE],
        cwd=tiny.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept = [path.relative_to(tmp_path) for path in tmp_path.rglob("jit_*-cache")]
    assert done.stdout.split()[-1] == str(hits)
    assert bool(kept) == bool(hits)
    parts = {"/".join(path.parts[:2]) for path in kept}
    assert all(part.startswith(chosen or "data/compiled") for part in parts)
