"""Parameters, active parameters, and the FLOPs of a token, counted by hand."""

import jax
import pytest

from moejax.model.size import model_size
from moejax.training import hardware
from moejax.training.meter import Meter
from tests import tiny

# V 256, D 16, H 2 of width 8, F 32, L 2, S 32.
EMBED = UNEMBED = 256 * 16
ATTENTION = 4 * 16 * 2 * 8  # query, key, value, out
NORMS = 2 * 2 * 16 + 16  # two in each of two layers, and the last
EXPERT = 3 * 16 * 32  # SwiGLU: in, gate, out
SCORES = 2 * 3 * (2 * 2 * 32 * 2 * 8)  # layers; forward and twice backward; 2 matmuls x 2 S H A


def test_a_dense_model():
    size = model_size(tiny.tiny(moe={"experts": 0}), 256)
    layer = ATTENTION + EXPERT  # the dense feed-forward has the same width as an expert
    assert size.total == size.active == EMBED + UNEMBED + NORMS + 2 * layer == 13_392
    assert size.flops == 6 * (UNEMBED + 2 * layer) + SCORES


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_model_with_experts_counts_those_that_a_token_visits(k):
    config = tiny.tiny(router={"name": "topk", "k": k, "renormalise": False})
    size = model_size(config, 256)
    router = 16 * 4
    rest = 2 * (ATTENTION + router)
    assert size.total == EMBED + UNEMBED + NORMS + rest + 2 * 4 * EXPERT
    assert size.active == EMBED + UNEMBED + NORMS + rest + 2 * k * EXPERT
    assert size.flops == 6 * (UNEMBED + rest + 2 * k * EXPERT) + SCORES


def test_experts_in_every_second_layer_and_shared_ones():
    """One dense layer, one with 4 experts of width 8, of which 2 are visited, and one shared."""
    config = tiny.tiny(moe={"every": 2, "ffn": 8, "shared": 1}, router={"name": "topk", "k": 2})
    size = model_size(config, 256)
    small = 3 * 16 * 8
    rest = EMBED + UNEMBED + NORMS + 2 * ATTENTION + EXPERT + 16 * 4 + small
    assert size.total == rest + 4 * small
    assert size.active == rest + 2 * small


def test_expert_choice_visits_k_experts_on_average():
    sizes = [
        model_size(tiny.tiny(router={"name": name, "k": 2}), 256)
        for name in ("topk", "expert_choice")
    ]
    assert sizes[0] == sizes[1]


def test_a_router_that_asks_every_expert_computes_them_all():
    few, every = (
        model_size(tiny.tiny(router={"name": name, "k": 2}), 256) for name in ("topk", "densemixer")
    )
    assert every.active == few.active
    assert every.flops == few.flops + 6 * 2 * (4 - 2) * EXPERT


def test_mfu_is_of_active_parameters():
    """10 steps a second of 256 tokens, a peak of 1 TFLOP/s; idle experts do not count."""
    few, many = (model_size(tiny.tiny(moe={"experts": experts}), 256) for experts in (4, 64))
    router = 2 * 16 * (64 - 4)
    assert many.total > 5 * few.total
    assert many.flops == few.flops + 6 * router
    meter = Meter(256, 256 * few.flops, 1e12)
    meter._steps, meter._since, meter._losses = 10, 1.0, [1.0]
    assert meter.record(10, 0.1)["mfu"] == pytest.approx(10 * 256 * few.flops / 1e12)


class Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_the_peak_is_that_of_all_devices_by_the_data_sheet(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [Device(kind)] * 4)
    assert hardware.peak_flops.__wrapped__() == 4 * peak
    assert hardware.device_name() == f"4 x {kind}"


def test_a_cpus_peak_is_measured(monkeypatch):
    monkeypatch.setattr(hardware, "_measured_flops", lambda: 123.0)
    assert hardware.peak_flops.__wrapped__() == 123.0
