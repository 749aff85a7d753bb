"""The choosing among implementations, driven with stand-ins: no GPU is needed."""

import time

import jax
import jax.numpy as jnp
import pytest

from moejax.dispatch import grouped
from moejax.dispatch.measured import fastest


def refuses():
    raise NotImplementedError("sm_100 only\nand more")


def slow():
    time.sleep(0.02)
    return jnp.ones(1)


def test_the_fastest_that_runs_is_chosen_and_says_why():
    name, why = fastest({"slow": slow, "quick": lambda: jnp.ones(1), "refuses": refuses})
    assert name == "quick"
    assert "slow 2" in why and "quick 0" in why and why.endswith("refuses failed: sm_100 only")
    assert fastest({"refuses": refuses, "slow": slow}).name == "slow"
    with pytest.raises(RuntimeError, match="no implementation runs here: refuses failed: sm_100"):
        fastest({"refuses": refuses})


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU and tokamax; what is tried there is recorded."""
    tried = []

    def trial(name):
        tried.append(name)
        return slow() if name == "ragged_dot" else jnp.ones(1)

    monkeypatch.setattr(grouped, "find_spec", lambda name: name)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(grouped, "_trial", trial)
    grouped._on_gpu.cache_clear()
    yield tried
    grouped._on_gpu.cache_clear()


def test_on_a_gpu_it_is_measured_once_also_while_a_layer_is_traced(gpu):
    names = []

    @jax.jit
    def layer(x):
        names.append(grouped.choose("cuda").name)
        return x

    layer(jnp.ones(1))
    assert names == ["tokamax"] and set(gpu) == {"ragged_dot", "tokamax"}
    before = len(gpu)
    assert "ragged_dot 2" in grouped.choose("cuda").why and len(gpu) == before


@pytest.mark.parametrize(
    ("module", "name", "value", "why"),
    [
        (grouped, "find_spec", lambda name: None, "tokamax is not installed"),
        (jax, "default_backend", lambda: "cpu", "no GPU is here to measure others on"),
        (jax, "process_count", lambda: 2, "processes that measure may not agree"),
    ],
)
def test_where_nothing_can_be_measured_it_is_the_compilers(
    gpu, monkeypatch, module, name, value, why
):
    monkeypatch.setattr(module, name, value)
    chosen = grouped.choose("cuda")
    assert chosen.name == "ragged_dot" and why in chosen.why and not gpu


def test_the_trial_runs_an_implementation_forward_and_backward():
    drows, (dw_in, dw_gate), dw_out = grouped._trial("ragged_dot", 64, 8, 4)
    assert drows.shape == (64, 8) and {a.shape for a in (dw_in, dw_gate, dw_out)} == {(4, 8, 8)}
    assert float(jnp.abs(dw_in).sum()) > 0
