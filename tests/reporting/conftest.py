"""Run directories with known numbers, in the format that training writes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moejax.routing.floors import max_vio_floor

EXPERTS, LAYERS, TOKENS, STEPS, EVAL_TOKENS = 8, 2, 2048, 60, 65536
DOMAINS = ("code", "docs", "sotu")

CONFIG: dict[str, Any] = {
    "model": {"layers": 4, "dim": 64, "ffn": 256, "heads": 4},
    "moe": {"experts": EXPERTS, "every": 2, "capacity_factor": 1.0, "groups": "sequence"},
    "router": {"name": "switch", "k": 1},
    "balance": {"load_balance": 0.01},
    "data": {"name": "stdlib", "sequence": 128, "batch": 16},
    "optimizer": {"learning_rate": 2e-3},
    "train": {"steps": STEPS, "accumulation": 1, "seed": 0},
    "mesh": {"data": 1},
}

# Final eval BPB per seed 0, 1, 2; MaxVio over the evaluation set; share of drops.
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"bpb": (2.50, 2.52, 2.48), "config": {"moe": {"experts": 0}}},
    "switch": {"bpb": (2.40, 2.43, 2.37), "max_vio": 0.60, "drop": 0.04},
    "loss_free": {
        "bpb": (2.39, 2.42, 2.375),
        "max_vio": 0.10,
        "drop": 0.01,
        "config": {"router": {"name": "loss_free", "k": 1}, "balance": {"load_balance": 0.0}},
    },
    "expert_choice": {
        "bpb": (2.45, 2.46, 2.44),
        "as_trained": (2.30, 2.32, 2.28),
        "max_vio": 0.0,
        "drop": 0.0,
        "leaks": True,
        "config": {"router": {"name": "expert_choice", "k": 1}},
    },
    "topk": {
        "bpb": (2.41, 2.42, 2.39),
        "max_vio": 0.35,
        "drop": 0.03,
        "drop_k": [0.01, 0.05],
        "config": {"router": {"name": "topk", "k": 2}},
    },
}


@pytest.fixture
def arms() -> dict[str, dict[str, Any]]:
    """The arms and their known numbers; a copy to change."""
    return copy.deepcopy(ARMS)


@pytest.fixture
def write() -> Callable[..., Path]:
    """write(out, arms=..., seeds=...) writes a comparison."""
    return write_comparison


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds: tests of the words leave it out."""
    monkeypatch.setattr("moejax.reporting.report.all_figures", lambda results: [])


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """A finished comparison of all arms."""
    return write_comparison(tmp_path / "out")


def write_comparison(
    out: Path, arms: Mapping[str, Mapping[str, Any]] = ARMS, seeds: Sequence[int] = (0, 1, 2)
) -> Path:
    """OUT with a suite.json and one finished run per arm and seed."""
    out.mkdir(parents=True, exist_ok=True)
    suite = {
        **{"name": "synthetic", "scale": "smoke", "question": "Which router learns most?"},
        **{"variants": {name: f"the {name} arm" for name in arms}, "seeds": list(seeds)},
        **{"baseline": "dense", "command": "moejax compare synthetic --out=runs/synthetic"},
    }
    (out / "suite.json").write_text(json.dumps(suite))
    for name, arm in arms.items():
        for i, seed in enumerate(seeds):
            write_run(out / name / f"seed{seed}", arm, i, seed)
    return out


def write_run(path: Path, arm: Mapping[str, Any], i: int, seed: int) -> None:
    """A finished run: config, run, metrics, summary."""
    path.mkdir(parents=True)
    config = copy.deepcopy(CONFIG)
    for section, values in arm.get("config", {}).items():
        config[section].update(values)
    config["train"]["seed"] = seed
    train = _train_records(arm, i, seed)
    evals = _eval_records(arm, i, seed, config["router"]["k"])
    tail = train[-len(train) // 10 :]
    mean = {
        k: float(np.mean([r[k] for r in tail])) for k in train[0] if isinstance(train[0][k], float)
    }
    summary = {
        **{"step": STEPS, "seconds": train[-1]["seconds"], "bpb": evals[-1]["bpb"]},
        **{"eval": evals[-1], "train": mean, "compile_seconds": 4.2, "wall_seconds": 14.0},
        "peak_memory_bytes": 123_000_000,
    }
    if config["moe"]["experts"]:
        shares = {"step": [10, 20], "saturation_SL": [[0.5, 0.25], [0.75, 1.0]], "floor": 0.125}
        summary["saturation"] = {**shares, "tokens": 2048}
    dense = not config["moe"]["experts"]
    info = {
        "params": {"total": 300_000 if dense else 900_000, "active": 300_000},
        **{"flops_per_token": 1.5e6, "versions": {"jax": "0.10.2"}, "device": "cpu x 2"},
        **{"commit": "abc1234", "leaks": arm.get("leaks", False)},
        "data": {"name": "stdlib", "fingerprint": "f00d", "domains": list(DOMAINS)},
        **{"moe_layers": 0 if dense else LAYERS, "tokens_per_step": TOKENS},
    }
    for name, content in (("config", config), ("run", info), ("summary", summary)):
        (path / f"{name}.json").write_text(json.dumps(content))
    lines = sorted([*train, *evals], key=lambda r: r["step"])
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))


def _train_records(arm: Mapping[str, Any], i: int, seed: int) -> list[dict[str, Any]]:
    random = np.random.default_rng([seed, len(arm)])
    return [_train_record(arm, i, step, random) for step in range(1, STEPS + 1)]


def _train_record(arm: Mapping[str, Any], i: int, step: int, random: Any) -> dict[str, Any]:
    decay = math.exp(-step / 12)
    record: dict[str, Any] = {
        **{"kind": "train", "step": step, "seconds": 0.15 * step},
        "loss": arm["bpb"][i] * math.log(2) + 2.5 * decay + 0.03 * random.normal(),
        **{"tokens_per_s": 14000.0, "mfu": 0.31, "grad_norm": 1.0},
        "learning_rate": 1.9e-3 * min(1.0, step / 6),
    }
    if "max_vio" in arm:
        vio = arm["max_vio"] * (1 + 3 * decay)
        record |= {"max_vio": vio, "drop": arm["drop"] * (1 + 5 * decay)}
        record |= {"left_behind": record["drop"] / 2, "dead": 0.0, "load_LE": _load(vio, random)}
        record |= {"drop_k": arm.get("drop_k", [record["drop"]])}
        by_layer = {"max_vio_L": vio, "drop_L": record["drop"]}
        by_layer |= {"load_entropy_L": 0.9, "router_entropy_L": 0.5}
        record |= {name: [value] * LAYERS for name, value in by_layer.items()}
    return record


def _eval_records(arm: Mapping[str, Any], i: int, seed: int, k: int) -> list[dict[str, Any]]:
    random = np.random.default_rng([seed, 7])
    records = []
    for step in range(10, STEPS + 1, 10):
        bpb = arm["bpb"][i] + (0.0 if step == STEPS else 3 * math.exp(-step / 12))
        offsets = {"code": -0.3, "docs": 0.1, "sotu": 0.2}
        record: dict[str, Any] = {
            **{"kind": "eval", "step": step, "seconds": 0.15 * step, "bpb": bpb},
            **{"bpb_domain": {d: bpb + offsets[d] for d in DOMAINS}, "tokens": EVAL_TOKENS},
        }
        if "max_vio" in arm:
            record["max_vio_global"] = arm["max_vio"]
            record["max_vio_floor"] = max_vio_floor(EVAL_TOKENS, EXPERTS, k)
            record |= {"drop": arm["drop"], "left_behind": arm["drop"] / 2, "dead": 0.0}
            record["load_LE"] = _load(arm["max_vio"], random)
        if "as_trained" in arm:
            record["bpb_as_trained"] = arm["as_trained"][i]
        records.append(record)
    return records


def _load(vio: float, random: Any) -> list[list[float]]:
    """Shares per layer whose largest is about (1 + vio) / E."""
    load_LE = 1 + min(vio, 6) * np.linspace(1, -1, EXPERTS).clip(-0.9) * random.uniform(
        0.8, 1, (LAYERS, EXPERTS)
    )
    load_LE = load_LE.clip(0)
    return (load_LE / load_LE.sum(1, keepdims=True)).tolist()
