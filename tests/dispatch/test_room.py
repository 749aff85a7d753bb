"""Devices with room for a part of all rows: what does not fit drops, and nothing else changes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import Config, MeshConfig, MoeConfig
from moejax.dispatch import Experts
from moejax.moe import MoeOptions, moe
from moejax.planning.pod import notes_of, spare_rows
from moejax.routing import RouterInput, RouterSpec, Routing, make_router, token_choice
from moejax.sharding import BATCH_AXES, SHARDINGS, make_mesh
from tests.dispatch.test_parallel import (
    COTANGENT_BSD,
    EXPERTS,
    PARAMS,
    ROWS,
    VALID_BS,
    X_BSD,
    close,
)

K = 3
MESHES = {
    "expert=8": MeshConfig(data=1, expert=8),
    "data=2 expert=4": MeshConfig(data=2, expert=4),
    "fsdp=2 expert=2 tensor=2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


def three_best(nowhere_BSK: np.ndarray | None, r: RouterInput) -> Routing:
    scores_TE = jax.nn.softmax(r.logits_TE)
    weight_TK, expert_TK = jax.lax.top_k(scores_TE, K)
    if nowhere_BSK is not None:
        expert_TK = jnp.where(nowhere_BSK.reshape(-1, K), EXPERTS, expert_TK)
    return token_choice(r, expert_TK, weight_TK, scores_TE)


def run(mesh: MeshConfig, factor: float | None, nowhere_BSK=None, crowd: float = 5.0):
    """Gradients of weights and tokens, outputs, statistics, most tokens crowding at the first three
    experts."""
    router = RouterSpec(functools.partial(three_best, nowhere_BSK), "token")
    options = MoeOptions(make_router(router), buffer_factor=factor)
    size = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    grid = make_mesh(mesh, jax.devices()[:size])
    p = PARAMS._replace(w_router_DE=PARAMS.w_router_DE.at[0, :K].add(crowd))

    def both(p, x_BSD, valid_BS):
        def loss(p, x_BSD):
            y_BSD, stats = moe(p, x_BSD, options=options, valid_BS=valid_BS, record=True)
            return (y_BSD * COTANGENT_BSD).sum(), (y_BSD, stats)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(p, x_BSD)

    weights = (NamedSharding(grid, SHARDINGS[w]) for w in ("w_in_EDF", "w_out_EFD", "w_gate_EDF"))
    tokens, whole = NamedSharding(grid, P(BATCH_AXES)), NamedSharding(grid, P())
    where = (p._replace(w_router_DE=whole, experts=Experts(*weights)), tokens, tokens)
    with jax.set_mesh(grid):
        return jax.device_get(jax.jit(both)(*jax.device_put((p, X_BSD, VALID_BS), where)))


def without_room(expert_BSK: np.ndarray, mesh: MeshConfig, factor: float) -> np.ndarray:
    """The definition: along each `expert` axis devices send their rows one after the other, each in
    the order of its tokens, and a device takes what it has room for."""
    pieces = expert_BSK.reshape(mesh.data * mesh.fsdp, mesh.expert, -1)
    room = math.ceil(factor * pieces.shape[-1])
    nowhere = np.zeros_like(pieces, bool)
    for group in range(len(pieces)):
        taken = np.zeros(mesh.expert, int)
        for sender, row in np.ndindex(pieces.shape[1:]):
            there = pieces[group, sender, row] // (EXPERTS // mesh.expert)
            if there < mesh.expert:
                nowhere[group, sender, row] = taken[there] >= room
                taken[there] += 1
    return nowhere.reshape(expert_BSK.shape)


@pytest.mark.parametrize(("name", "factor"), [*zip(MESHES, (1.0, 1.5, 1.5), strict=True)])
def test_what_has_no_room_drops(name: str, factor: float) -> None:
    """Values, gradients and counts are those of one device whose router sends it nowhere."""
    mesh = MESHES[name]
    grads, (y_BSD, stats) = run(mesh, factor)
    nowhere_BSK = without_room(stats.decisions.expert_TR, mesh, factor)
    np.testing.assert_array_equal(stats.decisions.dropped_TR, nowhere_BSK)
    assert nowhere_BSK.any() and not nowhere_BSK.all()
    assert int((stats.load_E - stats.kept_E).sum()) == nowhere_BSK.sum()
    wanted_grads, (wanted_BSD, wanted) = run(MeshConfig(data=1), None, nowhere_BSK)
    jax.tree.map(close, (grads, y_BSD), (wanted_grads, wanted_BSD))
    np.testing.assert_array_equal(stats.kept_E, wanted.kept_E)
    # No token loses its place at an expert to a later one of its sequence.
    for sequence, expert in np.ndindex(ROWS, EXPERTS):
        mine_SK = stats.decisions.expert_TR[sequence] == expert
        dropped_S = (mine_SK & nowhere_BSK[sequence]).any(-1)[mine_SK.any(-1)]
        assert (np.diff(dropped_S.astype(int)) >= 0).all()


def test_room_that_is_not_needed_changes_nothing() -> None:
    got = run(MESHES["data=2 expert=4"], 3.75, crowd=0.0)
    jax.tree.map(close, got, run(MeshConfig(data=1), None, crowd=0.0))


def test_a_plan_counts_the_rows_there_is_room_for() -> None:
    config = Config(moe=MoeConfig(buffer_factor=1.5))
    assert spare_rows(config, {"expert": 8}) == 1.5 and spare_rows(config, {"expert": 1}) == 1
    assert spare_rows(Config(), {"expert": 8}) == 8
    (note,) = notes_of(Config(), {"expert": 8}, ())
    assert "room for 8 times its fair share" in note and "moe.buffer_factor=2" in note
    assert notes_of(config, {"expert": 8}, ()) == notes_of(Config(), {"expert": 1}, ()) == ()


def test_a_factor_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer_factor=0.5 is less than a device's fair share"):
        MoeConfig(buffer_factor=0.5)
    # Gather keeps buffers for sequences, in training or only in evaluation.
    for groups in ({"groups": "sequence"}, {"eval_groups": "sequence"}):
        assert MoeConfig(buffer_factor=2.0, **groups)
        with pytest.raises(ValueError, match="travel sorted.*set moe.dispatch='dropless'"):
            MoeConfig(buffer_factor=2.0, dispatch="gather", **groups)
    with pytest.raises(ValueError, match="travel sorted.*set moe.dispatch='dropless'"):
        MoeConfig(buffer_factor=2.0, dispatch="einsum")
    assert MoeConfig(buffer_factor=2.0, dispatch="gather").evaluation().buffer_factor == 2.0


def test_whose_rows_have_room_depends_on_other_sequences() -> None:
    alone = Config(moe=MoeConfig(buffer_factor=2.0))
    spread = dataclasses.replace(alone, mesh=MeshConfig(data=1, expert=8))
    assert alone.dependence == Config().dependence and not alone.dependence.others
    assert spread.dependence == alone.dependence._replace(others=True)
