"""The published models: as large as published, routed as published, planned and lowered."""

import dataclasses
import json
import math
from typing import Any

import pytest

from experiments import plan_pods
from moejax.cli import load_experiment
from moejax.config import Config
from moejax.model.size import Size, model_size
from moejax.planning.chips import parse_topology
from moejax.planning.result import vocabulary
from moejax.sharding import mesh_sizes
from tests import abstract

RESULTS = plan_pods.PODS.parent / "results" / "pods"
POD = pytest.mark.parametrize("name", plan_pods.NAMES)


def config_of(name: str) -> Config:
    return Config.from_dict(plan_pods.load(name).get_config())


def size_of(name: str) -> Size:
    config = config_of(name)
    return model_size(config, vocabulary(config))


def test_every_file_is_a_pod() -> None:
    assert {path.stem for path in plan_pods.PODS.glob("*.py")} == set(plan_pods.NAMES)


# In billions, and half of the last digit that is published.
TOTAL = {
    "switch_c": (1571, 0.5),  # Fedus et al., table 9
    "gshard_600b": (600, 50),  # Lepikhin et al., table 1: "600B"
    "mixtral_8x7b": (46.7, 0.05),
    "olmoe_1b_7b": (6.92, 0.005),  # Muennighoff et al., table 10
    "deepseek_moe_16b": (16.4, 0.05),
    "deepseek_v3": (671, 0.5),
}
ACTIVE = {
    "mixtral_8x7b": (12.9, 0.05),
    "olmoe_1b_7b": (1.28, 0.005),
    "deepseek_moe_16b": (2.8, 0.05),
    "deepseek_v3": (37, 0.5),
}


@POD
def test_it_has_the_published_number_of_parameters(name: str) -> None:
    billions, tolerance = TOTAL[name]
    assert size_of(name).total / 1e9 == pytest.approx(billions, abs=tolerance)


@pytest.mark.parametrize("name", ACTIVE)
def test_it_has_the_published_number_of_active_parameters(name: str) -> None:
    config, active = config_of(name), size_of(name).active
    if name == "deepseek_v3":  # published without the embedding, which is looked up
        active -= vocabulary(config) * config.model.dim
    billions, tolerance = ACTIVE[name]
    assert active / 1e9 == pytest.approx(billions, abs=tolerance)


def test_gshards_experts_by_hand() -> None:
    """Nearly all of it: 18 layers of 2,048 ReLU networks of 1,024 x 8,192."""
    experts = 18 * 2048 * 2 * 1024 * 8192
    assert experts == pytest.approx(618.5e9, rel=1e-3)
    assert 0 < size_of("gshard_600b").total - experts < 1.5e9


# Router, its options, experts, weights of the losses; capacity, where there is one.
ROUTED: dict[str, tuple[str, dict[str, Any], int, dict[str, float], float | None]] = {
    # .01 in each of 30 layers, whose losses Switch adds up
    "switch_c": ("switch", {"k": 1}, 2048, {"load_balance": 0.3}, 1.0),
    "gshard_600b": (
        *("gshard_top2", {"k": 2, "second": "random"}, 2048),
        *({"load_balance_top1": 0.01}, 1.0),
    ),
    "mixtral_8x7b": ("topk", {"k": 2, "renormalise": True}, 8, {"load_balance": 0.01}, None),
    "olmoe_1b_7b": (
        *("topk", {"k": 8, "renormalise": False}, 64),
        *({"load_balance": 0.01, "router_z": 0.001}, None),
    ),
    "deepseek_moe_16b": ("deepseek_moe", {"k": 6}, 64, {"load_balance": 0.001}, None),
    "deepseek_v3": (
        "deepseek_v3",
        {"k": 8, "expert_groups": 8, "top_groups": 4, "route_scale": 2.5, "bias_rate": 0.001},
        *(256, {"load_balance_sequence": 1e-4}, None),
    ),
}


@POD
def test_it_routes_as_published(name: str) -> None:
    config = config_of(name)
    router, options, experts, balance, capacity = ROUTED[name]
    given = dict(config.router.options)
    assert config.router.name == router and options.items() <= given.items()
    assert config.moe.experts == experts
    assert {loss: weight for loss, weight in config.balance if weight} == pytest.approx(balance)
    assert config.moe.capacity_factor == capacity
    assert config.moe.dispatch == ("dropless" if capacity is None else "gather")
    if capacity:  # one slot of each expert for each choice of its group's tokens over E
        assert config.moe.groups == "sequence"
        assert capacity * options["k"] * config.data.sequence / experts == 1


@POD
def test_its_file_says_how_to_plan_it(name: str) -> None:
    module = plan_pods.load(name)
    command = f"moejax plan experiments/pods/{name}.py --topology={module.TOPOLOGY}"
    assert command in (module.__doc__ or "")
    with pytest.raises(ValueError, match="unknown scale 'smoke'; known: full"):
        module.get_config("smoke")


@POD
def test_it_lowers_for_4096_devices(name: str) -> None:
    """Its own mesh, repeated along `data`; no expert's weight is copied within a repetition."""
    config = config_of(name)
    mesh = dataclasses.asdict(config.mesh)
    times = abstract.DEVICES // math.prod(mesh.values())
    mesh["data"] *= times
    # A row a device: 2^31 assignments and more in a microbatch cannot be numbered in int32.
    rows = mesh["data"] * mesh["fsdp"] * mesh["expert"] * config.train.accumulation
    laid, lowered = abstract.lowered(abstract.on_pod(config, mesh, rows))
    kept = 3 if config.optimizer.name == "adamw" else 1  # with both moments
    matrices = 3 if config.model.activation == "swiglu" else 2
    assert abstract.assert_experts_are_cut(laid) == kept * matrices
    assert lowered.out_info[1]["load_LE"].shape == (config.moe_layers, config.moe.experts)


@POD
def test_its_committed_plan_is_of_this_config_and_fits(name: str) -> None:
    plan = json.loads((RESULTS / f"{name}.json").read_text())
    topology = parse_topology(plan_pods.load(name).TOPOLOGY)
    config, size = config_of(name), size_of(name)
    assert plan["topology"] == topology.name and plan["compiled"]
    assert plan["mesh"] == mesh_sizes(config.mesh, plan["devices"])
    assert plan["params"] == {"total": size.total, "active": size.active}
    assert plan["tokens"] == config.data.batch * config.data.sequence
    assert plan["memory"]["total"] < plan["memory"]["hbm"]
    assert plan["versions"].keys() == {"jax", "libtpu"}


def test_the_committed_table_is_that_of_the_plans() -> None:
    assert (RESULTS / "README.md").read_text() == plan_pods.readme(RESULTS), (
        "python -m experiments.plan_pods --table"
    )


def test_a_pod_that_does_not_fit_says_so_in_the_table(tmp_path: Any) -> None:
    error = {
        "error": "does not fit: 99.00 GiB needed",
        "topology": "v4:2x2x2",
        "versions": {},
        "commit": "",
    }
    (tmp_path / "switch_c.json").write_text(json.dumps(error))
    assert "| v4:2x2x2 | does not fit: 99.00 GiB needed |" in plan_pods.readme(tmp_path)


def test_a_pod_that_is_none_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*deepseek_v3\.py'"):
        load_experiment(str(plan_pods.PODS / "deepseek_v4.py"))
