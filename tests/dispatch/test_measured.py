"""The choosing among implementations, driven with stand-ins: no GPU is needed."""

import re
import time
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from moejax.dispatch import grouped, trial
from moejax.dispatch.grouped import IMPLEMENTATIONS, Implementation
from moejax.dispatch.measured import Measured, fastest

SIZES = trial.Sizes(4, 128, 128, "float32")
RAGGED = IMPLEMENTATIONS["ragged_dot"]


def refuses(*_):
    raise NotImplementedError("sm_100 only\nand more")


def slow():
    time.sleep(0.02)
    return jnp.ones(1)


def right(result):
    if not jnp.all(result == 1):
        raise ValueError("off by 1")


def test_the_fastest_that_runs_and_is_right_is_chosen_and_says_why():
    runs = {"slow": slow, "quick": lambda: jnp.ones(1), "refuses": refuses}
    runs["wrong"] = lambda: jnp.zeros(1)
    name, told, _ = fastest(runs, right)
    assert name == "quick" and re.match(r"slow \d+\.\d\d ms; quick \d+\.\d\d ms; ", told)
    assert told.endswith("refuses failed: sm_100 only; wrong failed: off by 1")
    assert fastest({"refuses": refuses, "slow": slow}, right).name == "slow"
    with pytest.raises(RuntimeError, match="no implementation runs here: refuses failed: sm_100"):
        fastest({"refuses": refuses}, right)


def other(forward=lambda y: y, backward=lambda grads: grads, seconds=0.0):
    """Another grouped product, which may be slow or wrong."""

    def forwards(*args):
        y, residuals = RAGGED.forward(*args)
        jax.debug.callback(partial(time.sleep, seconds))
        return forward(y), residuals

    return Implementation(forwards, lambda *args: backward(RAGGED.backward(*args)))


def swapped(grads):
    drows, (dw_in, dw_gate), dw_out = grads
    return drows, (dw_gate, dw_in), dw_out


def idle(grads):
    """What a kernel leaves where it has nothing to write."""
    drows, dins, dw_out = grads
    return drows, dins, jnp.where(dw_out.any((1, 2), keepdims=True), dw_out, 1e-3)


def few(grads):
    """Of a kernel whose pipeline is longer than an expert of few rows."""
    drows, dins, dw_out = grads
    return drows, dins, dw_out.at[trial.FEW].set(0.0)


def test_numbers_of_forward_and_backward_are_checked(gpu):
    wrong = {
        "leaves nobody's rows": other(lambda y: jnp.where(y == 0, jnp.nan, y)),
        "last rows wrong": other(lambda y: y.at[200:].multiply(1.1)),
        "swaps": other(backward=swapped),
        "idle": other(backward=idle),
        "few": other(backward=few),
        "nan": other(backward=lambda grads: jax.tree.map(lambda g: g * jnp.nan, grads)),
        "refuses": Implementation(refuses, refuses),
    }
    among = (("slow", other(seconds=0.2)), *wrong.items(), ("right", other()))
    name, why = trial.on_gpu(SIZES, among)
    assert name == "right" and "measured here: slow " in why and "; right " in why
    for part in (
        "leaves nobody's rows failed: rows of no expert give what is not finite",
        "last rows wrong failed: outputs are off by 0.1 of their norm",
        "swaps failed: the input weights' gradients are off by",
        "few failed: the output weights' gradients are off by 1 of their norm",
        "idle failed: the weights of an expert without rows get a gradient",
        "nan failed: the rows' gradients are off by nan",
        "refuses failed: sm_100 only",
    ):
        assert part in why


def test_it_is_measured_once_for_sizes_also_while_a_layer_is_traced(gpu, monkeypatch):
    tried = []

    def measured(sizes, among):
        tried.append((sizes.varying, tuple(name for name, _ in among)))
        return Measured("found", "in no time")

    monkeypatch.setattr(trial, "_measure", measured)

    @jax.jit
    def layer(x):
        assert grouped.choose("cuda", sizes=SIZES).name == "found"
        return x

    layer(jnp.ones(1))
    layer(jnp.ones(2))
    grouped.choose("cuda", sizes=SIZES._replace(varying=True))
    every = ("ragged_dot", "blocks", "hopper", "tokamax")
    assert tried == [(False, every), (True, every[:2])]


def test_inside_a_mesh_nothing_of_it_reaches_the_trial(gpu):
    among = (("ragged_dot", RAGGED), ("other", other()))
    found = []

    def shard(x):
        found.append(trial.on_gpu(SIZES, among))
        return x

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones(2), jax.NamedSharding(mesh, jax.P("data")))
        jax.jit(jax.shard_map(shard, out_specs=jax.P("data")))(x)
    assert "the fastest measured here: ragged_dot" in found[0].why and "; other" in found[0].why


def test_where_nothing_can_be_measured_it_is_the_compilers(gpu, monkeypatch):
    def found(sizes=SIZES):
        trial.on_gpu.cache_clear()
        name, why = trial.on_gpu(sizes, (("ragged_dot", other(refuses)), ("other", other(refuses))))
        assert name == "ragged_dot" and why.startswith("the compiler's own; ")
        return why

    assert "nothing could be measured: no implementation runs here: ragged_dot failed" in found()
    assert "networks narrower than 128 are not worth a trial" in found(SIZES._replace(ffn=64))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "processes that measure may not agree" in found()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert "no GPU is here to measure others on" in found()
