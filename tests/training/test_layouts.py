"""Layout changes nothing: twenty steps of training give the same curves on any mesh, with any
accumulation, with and without remat.

The default run takes three arms over two layouts; `pytest tests --layouts=all` takes every router
of the catalogue and every dispatch over all of them (a quarter of an hour on two cores).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from experiments import catalogue
from moejax.config import Config, MeshConfig, default_config, override
from moejax.data import Batch
from moejax.training.program import build_program
from tests import tiny

STEPS = 20


class Layout(NamedTuple):
    mesh: MeshConfig = MeshConfig(data=1)
    accumulation: int = 1
    remat: str = "none"

    @property
    def devices(self) -> int:
        m = self.mesh
        return m.data * m.fsdp * m.expert * m.tensor


LAYOUTS = {
    "remat=full": Layout(remat="full"),
    "remat=routing": Layout(remat="routing"),
    "accumulation=2": Layout(accumulation=2),
    "accumulation=4": Layout(accumulation=4),
    "data=2": Layout(MeshConfig(data=2)),
    "fsdp=2": Layout(MeshConfig(data=1, fsdp=2)),
    "expert=2": Layout(MeshConfig(data=1, expert=2)),
    "tensor=2": Layout(MeshConfig(data=1, tensor=2)),
    "expert=4": Layout(MeshConfig(data=1, expert=4)),
    "data=2 expert=2": Layout(MeshConfig(data=2, expert=2)),
    "data=8": Layout(MeshConfig(data=8)),
    "all axes": Layout(MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
    "all": Layout(MeshConfig(data=1, fsdp=2, expert=2, tensor=2), accumulation=2, remat="routing"),
}
SOME = {"all axes": ("switch", "expert_choice"), "all": ("loss_free", "noisy_topk")}
ARMS: dict[str, dict[str, Any]] = catalogue.get_suite("smoke").variants
ARMS |= {
    f"{arm} {dispatch}": {**ARMS[arm], "moe.dispatch": dispatch}
    for arm in ("switch", "expert_choice", "loss_free")
    for dispatch in ("einsum", "gather", "dropless")
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" not in metafunc.fixturenames:
        return
    every = metafunc.config.getoption("--layouts") == "all"
    chosen = {name: tuple(ARMS) if every else SOME.get(name, ()) for name in LAYOUTS}
    pairs = [(arm, name) for name, arms in chosen.items() for arm in arms]
    metafunc.parametrize(("arm", "layout"), sorted(pairs))


def config_of(arm: str, layout: Layout) -> Config:
    """The catalogue's arm at the tests' size. Who drops depends on the group, which accumulation
    cuts unless it is a sequence."""
    sizes = {**tiny.SIZES, "moe.experts": 8, "model.layers": 1, "train.steps": STEPS}
    small = {"router.tile": 4} if arm == "token_rounding" else {}
    slots = {"moe.slots": 2} if arm == "soft" else {}
    tree = {**sizes, "data.data_dir": tiny.data_dir(), "moe.groups": "sequence"}
    tree |= {**ARMS[arm], "moe.experts": 0 if arm == "dense" else 8, **small, **slots}
    tree |= {"moe.eval_groups": ""}  # nothing is evaluated; a microbatch may be too small for it
    tree |= {"model.remat": layout.remat, "train.accumulation": layout.accumulation}
    tree |= {f"mesh.{axis}": size for axis, size in dataclasses.asdict(layout.mesh).items()}
    return Config.from_dict(override(default_config(), tree))


@functools.cache
def curves(arm: str, layout: Layout) -> tuple[dict[str, np.ndarray], Any]:
    """Metrics of each step, and the routers' state after the last."""
    config = config_of(arm, layout)
    devices = tuple(jax.devices()[: layout.devices])
    program = build_program(config, tiny.VOCABULARY, 1, devices)
    state, said = program.init(0), []
    for step in range(STEPS):
        batch = program.put(rows_without_ties(step, config.data.batch, config.data.sequence))
        state, metrics = program.train_step(state, batch)
        said.append(jax.device_get(metrics))
    return jax.tree.map(lambda *a: np.stack(a), *said), jax.device_get(state.router_state)


def rows_without_ties(step: int, rows: int, length: int) -> Batch:
    """Counting in steps of an odd number, from another start in each row. No two tokens have the
    same past: of two equal ones that compete for an expert, rounding would choose."""
    random = np.random.default_rng(step)
    start_B1 = random.permutation(tiny.VOCABULARY)[:rows, None]
    stride_B1 = 2 * random.integers(0, 4, (rows, 1)) + 1
    row_BS = (start_B1 + stride_B1 * np.arange(length + 1)) % tiny.VOCABULARY
    row_BS = row_BS.astype(np.int32)
    position_BS = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(
        tokens_BS=row_BS[:, :-1],
        targets_BS=row_BS[:, 1:],
        segment_BS=np.zeros((rows, length), np.int32),
        position_BS=position_BS,
        valid_BS=np.ones((rows, length), bool),
        domain_B=np.zeros(rows, np.int32),
    )


def test_twenty_steps_are_the_same(arm: str, layout: str) -> None:
    got, got_state = curves(arm, LAYOUTS[layout])
    want, want_state = curves(arm, Layout())
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, got, want)
    jax.tree.map(close, got_state, want_state)
    assert want["loss"][-1] < want["loss"][0]  # it has learnt something meanwhile
