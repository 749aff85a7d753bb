"""How every test runs: eight simulated devices, no silent broadcasting, the same examples.

And with XLA's lowest optimisation level: tests compile thousands of programs and run each once or
twice. JAX 0.10 can also do without XLA's fusion emitters, which take most of what is left.
"""

import gc
import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
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
