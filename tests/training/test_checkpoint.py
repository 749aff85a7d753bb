"""Checkpoints: what is in them, which are left, where they can be restored, what is refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MeshConfig
from moejax.sharding import make_mesh
from moejax.training.checkpoint import Checkpoints, check_claim, claim
from moejax.training.loop import train
from moejax.training.state import TrainState, shardings
from tests import tiny


def small_state(step):
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        zero + step, zero, jnp.zeros(2, jnp.uint32), {"w_DF": jnp.ones((2, 3))}, (), None
    )


def saved(folder, bpb_of_step, newest=2):
    checkpoints = Checkpoints(folder, newest)
    for step, bpb in bpb_of_step.items():
        checkpoints.save(small_state(step), {"bpb": bpb}, bpb)
    checkpoints.close()


def steps_in(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def shapes(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def test_a_checkpoint_is_the_state_of_its_step_though_its_buffers_are_donated(program, tmp_path):
    """Saving is asynchronous: on a CPU it reads the very buffers that the next steps want to
    reuse."""
    checkpoints, copies = Checkpoints(tmp_path, 10), {}
    state = program.init(0)
    for k in range(1, 6):
        batch = program.put(tiny.dataset().train_batch(8 * k, seed=0))
        state, _ = program.train_step(state, batch)
        copies[k] = tiny.copied(state)
        checkpoints.save(state, {}, None)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, read_only=True)
    for k, copy in copies.items():
        tiny.assert_identical(checkpoints.restore(program.abstract_state, k)[0], copy)
    checkpoints.close()
    assert not np.array_equal(copies[1].params["embed_VD"], copies[2].params["embed_VD"])


def test_the_newest_and_the_best_are_kept(tmp_path):
    saved(tmp_path, {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.5, 6: 2.6})
    assert steps_in(tmp_path) == [2, 5, 6]


def test_checkpoints_before_the_first_evaluation_do_not_pile_up(tmp_path):
    saved(tmp_path, {1: None, 2: None, 3: None, 4: None, 5: 3.0, 6: 4.0, 7: 5.0}, newest=1)
    assert steps_in(tmp_path) == [5, 7]


@pytest.mark.parametrize("name", ["4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17"])
def test_a_torn_checkpoint_is_not_there(tmp_path, name):
    saved(tmp_path, {2: 5.0, 3: 4.0})
    torn = tmp_path / "checkpoints" / name / "state"
    torn.mkdir(parents=True)
    (torn / "manifest.ocdbt").write_bytes(b"cut")
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.latest == 3
    reader.close()
    assert torn.exists()  # perhaps another process is writing it
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest == 3
    state, _ = checkpoints.restore(shapes(small_state(0)))
    checkpoints.close()
    assert state.step == 3
    assert not torn.exists()


MESHES = [
    MeshConfig(data=1),
    MeshConfig(data=2, fsdp=1, expert=2, tensor=2),
    MeshConfig(data=1, fsdp=2, expert=4),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_checkpoint_is_restored_onto_another_mesh_bit_for_bit(program, tmp_path, mesh):
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), program.abstract_state
    )
    state = program.init(3)
    here = shardings(abstract, make_mesh(MeshConfig(data=4, fsdp=2)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(jax.device_put(state, here), {}, None)
    checkpoints.close()
    count = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    there = shardings(abstract, make_mesh(mesh, jax.devices()[:count]))
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, there
    )
    checkpoints = Checkpoints(tmp_path, read_only=True)
    restored, _ = checkpoints.restore(target)
    checkpoints.close()
    tiny.assert_identical(restored, state)
    assert jax.tree.map(lambda a: a.sharding, restored) == there


def test_a_step_that_is_not_there_names_those_that_are(tmp_path):
    saved(tmp_path, {2: 5.0, 3: 4.0})
    checkpoints = Checkpoints(tmp_path, read_only=True)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 9 .* there are: \[2, 3\]"):
        checkpoints.restore(shapes(small_state(0)), 9)
    checkpoints.close()


def test_a_reader_makes_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Checkpoints(tmp_path, read_only=True)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_sizes_names_the_array_and_both_shapes(tmp_path):
    saved(tmp_path, {2: 5.0})
    before = tiny.snapshot(tmp_path)
    wider = small_state(0)._replace(params={"w_DF": jnp.ones((2, 5))})
    checkpoints = Checkpoints(tmp_path, read_only=True)
    with pytest.raises(ValueError, match=r"w_DF has shape \(2, 3\), this config needs \(2, 5\)"):
        checkpoints.restore(shapes(wider))
    checkpoints.close()
    assert tiny.snapshot(tmp_path) == before


def changed(config, section, **values):
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "dim", 32), ("train", "seed", 1), ("optimizer", "learning_rate", 0.5)],
)
def test_the_folder_of_another_config_is_refused_untouched(finished, config, section, key, value):
    workdir, _ = finished
    before = tiny.snapshot(workdir)
    old = getattr(getattr(config, section), key)
    message = re.escape(f"{section}.{key}={old}, this one has {section}.{key}={value}")
    with pytest.raises(ValueError, match=message):
        train(changed(config, section, **{key: value}), workdir, quiet=True)
    assert tiny.snapshot(workdir) == before


def test_how_often_a_run_saves_and_where_it_runs_may_change(finished, config):
    workdir, _ = finished
    check_claim(workdir, changed(config, "train", log_every=9, checkpoint_every=9, keep=9))
    check_claim(workdir, changed(config, "mesh", data=4, fsdp=2))


def test_a_folder_with_other_files_is_refused_untouched(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no run of moejax"):
        train(config, tmp_path, quiet=True)
    assert tiny.snapshot(tmp_path) == {"thesis.tex": b"precious"}


def test_a_file_is_no_folder(config, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="is a file"):
        train(config, tmp_path / "file", quiet=True)


def test_a_run_does_not_go_on_with_other_text(finished, config):
    workdir, _ = finished
    run = json.loads((workdir / "run.json").read_text())
    original = run["data"]["fingerprint"]
    run["data"]["fingerprint"] = "0123"
    (workdir / "run.json").write_text(json.dumps(run))
    before = tiny.snapshot(workdir)
    try:
        with pytest.raises(ValueError, match=f"fingerprint 0123, .* has {original}"):
            train(config, workdir, quiet=True)
        assert tiny.snapshot(workdir) == before
    finally:
        run["data"]["fingerprint"] = original
        (workdir / "run.json").write_text(json.dumps(run))


@pytest.mark.parametrize(
    "mesh", [{"data": 3}, {"data": 1, "tensor": 8}, {"data": 1, "expert": 8}], ids=str
)
def test_a_config_that_does_not_fit_the_machine_claims_no_folder(tmp_path, mesh):
    with pytest.raises(ValueError, match=r"mesh|mesh axis"):
        train(tiny.tiny(mesh=mesh), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_claimed_folder_holds_the_whole_config(config, tmp_path):
    claim(tmp_path / "run", config)
    there = json.loads((tmp_path / "run" / "config.json").read_text())
    assert type(config).from_dict(there) == config
