"""Parameters, active parameters and FLOPs by hand, for one dense and one MoE model."""

import dataclasses

import jax
import pytest

from moejax.model.size import model_size
from moejax.training import hardware
from tests import tiny

# L = 2, D = 16, heads 2 x 8, F = 32, V = 256, S = 32, SwiGLU
EMBED = UNEMBED = 256 * 16
ATTENTION = 4 * 16 * 16
EXPERT = 3 * 16 * 32
NORMS = 2 * 2 * 16 + 16
SCORES = 2 * (2 * 32 * 16 + 2 * 32 * 16)  # layers x (q k + probabilities v), a token, forward


def test_a_dense_model_by_hand():
    size = model_size(tiny.tiny(moe={"experts": 0}), 256)
    total = EMBED + UNEMBED + 2 * (ATTENTION + EXPERT) + NORMS
    assert (size.total, size.active) == (total, total)
    assert size.flops == 6 * (UNEMBED + 2 * (ATTENTION + EXPERT)) + 3 * SCORES


@pytest.mark.parametrize(("name", "k"), [("topk", 2), ("switch", 1), ("expert_choice", 2)])
def test_an_moe_by_hand(name, k):
    """Four experts and a router in both layers; k of them work on a token."""
    size = model_size(tiny.tiny(router={"name": name}), 256)
    shared = UNEMBED + 2 * (ATTENTION + 16 * 4)
    assert size.total == EMBED + NORMS + shared + 2 * 4 * EXPERT
    assert size.active == EMBED + NORMS + shared + 2 * k * EXPERT
    assert size.flops == 6 * (shared + 2 * k * EXPERT) + 3 * SCORES


def test_a_shared_expert_and_a_dense_first_layer_by_hand():
    size = model_size(tiny.tiny(moe={"shared": 1, "first_dense": 1}), 256)
    common = EMBED + UNEMBED + NORMS + 2 * ATTENTION + EXPERT + 16 * 4 + EXPERT
    assert size.total == common + 4 * EXPERT
    assert size.active == common + 2 * EXPERT


def test_the_compiled_model_has_as_many_parameters(program, config):
    leaves = jax.tree.leaves(program.abstract_state.params)
    assert sum(leaf.size for leaf in leaves) == program.size.total == model_size(config, 256).total


def test_the_peak_is_the_data_sheets_times_the_devices(monkeypatch):
    @dataclasses.dataclass
    class Device:
        device_kind: str

    kinds = {
        "TPU v5 lite": 197e12,
        "TPU v5p": 459e12,
        "TPU v4": 275e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
    }
    for kind, peak in kinds.items():
        monkeypatch.setattr(hardware.jax, "devices", lambda kind=kind: [Device(kind)] * 4)
        hardware.peak_flops.cache_clear()
        assert hardware.peak_flops() == 4 * peak, kind
        assert hardware.device_name() == f"4 x {kind}"
    hardware.peak_flops.cache_clear()


def test_the_peak_of_a_cpu_is_measured():
    hardware.peak_flops.cache_clear()
    assert 1e9 < hardware.peak_flops() < 1e14
