"""How every test runs: eight simulated devices, no silent broadcasting, the same examples.

And with XLA's lowest optimisation level, each program in one piece: tests compile thousands of
programs and run each once or twice. JAX 0.10 can also do without XLA's fusion emitters, which take
most of what is left.

On a GPU, for what fits on one: JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest, since
its float32 products are TensorFloat-32's otherwise.
"""

import gc
import importlib.metadata
import os
from collections import Counter

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # nothing of an earlier session's is taken
if os.environ["JAX_PLATFORMS"] == "cpu":  # on a GPU the compiler is as users have it
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    )
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones abort at this flag
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--layouts",
        choices=("some", "all"),
        default="some",
        help="on how many meshes every router is compared with one device",
    )


# Files that take long for their number of tests, the longest first: real processes, notebooks, a
# TPU's compiler, whole training steps.
LONG = [
    "training/test_processes.py",
    "tests/test_house.py",
    "planning/test_plan.py",
    "training/test_killed.py",
    "training/test_recording.py",
    "training/test_step.py",
    "training/test_layouts.py",
    "training/test_chain.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files go to xdist's workers: LONG, then the others by their number of tests, so that
    no worker waits at the end for another's long file."""
    tests = Counter(item.path for item in items)
    place = {path: i for path in tests for i, end in enumerate(LONG) if str(path).endswith(end)}
    items.sort(key=lambda item: (place.get(item.path, len(LONG)), -tests[item.path], item.path))


def pytest_collection_finish() -> None:
    """Python looks for garbage cycles seldom, and never in what is imported: tracing makes millions
    of objects that go by themselves. After each file all garbage is collected anyway."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Compiled programs of a file are given back after it: thousands in one process use up the
    memory maps that Linux allows, and XLA aborts."""
    yield
    jax.clear_caches()
    gc.collect()


settings.register_profile(
    "moejax",
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # the first example pays for the compiler
)
settings.load_profile("moejax")
