"""What the tests of choosing share."""

import jax
import pytest

from moejax.dispatch import trial


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with one GPU, as far as one asks it, and nothing kept; returns where choices will
    be."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("MOEJAX_DATA_DIR", str(tmp_path))
    trial.on_gpu.cache_clear()
    yield tmp_path / "choices"
    trial.on_gpu.cache_clear()
