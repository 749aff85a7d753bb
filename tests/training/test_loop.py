"""What stops a run, and what it leaves behind then."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.training import loop as loop_file
from moejax.training.loop import train
from moejax.training.meter import NonFiniteLoss
from moejax.training.records import read_records
from tests import tiny


@pytest.mark.parametrize("step", [5, 7, 12])
def test_a_loss_that_is_not_finite_stops_before_anything_of_it_is_saved(
    program, config, tmp_path, monkeypatch, step
):
    """Poisoned parameters from `step` on; checkpoints are due at 5, 10 and 12, evaluations at 5."""

    def poisoned(state, batch):
        if int(state.step) == step - 1:
            bad = {**state.params, "embed_VD": jnp.full_like(state.params["embed_VD"], jnp.nan)}
            state = state._replace(params=bad)
        return program.train_step(state, batch)

    monkeypatch.setattr(
        loop_file, "build_program", lambda *_: dataclasses.replace(program, train_step=poisoned)
    )
    every = dataclasses.replace(config.train, checkpoint_every=5)
    config = dataclasses.replace(config, train=every)
    with pytest.raises(NonFiniteLoss, match=rf"step {step}: loss nan, .* position {8 * step} "):
        train(config, tmp_path / "run", quiet=True)
    assert all(r["step"] < step for r in read_records(tmp_path / "run" / "metrics.jsonl"))
    assert not (tmp_path / "run" / "summary.json").exists()
    folders = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert folders == {s for s in (5, 10) if s < step}
    if folders:
        state = tiny.saved_state(tmp_path / "run", config)
        assert state.step == max(folders)
        assert np.isfinite(state.params["embed_VD"]).all()


def test_a_run_cut_between_two_records_writes_the_same_records(
    config, finished, tmp_path, monkeypatch
):
    """Saved at step 5 and logged at 4 and 6: the mean loss of record 6 needs step 5 of the first
    attempt."""
    saved = []

    def stop_after_five(self, *arguments):
        save(self, *arguments)
        saved.append(arguments)
        raise loop_file.Stopped("enough")

    save = loop_file.Checkpoints.save
    every = dataclasses.replace(config.train, checkpoint_every=5)
    config = dataclasses.replace(config, train=every)
    with monkeypatch.context() as patch:
        patch.setattr(loop_file.Checkpoints, "save", stop_after_five)
        with pytest.raises(loop_file.Stopped):
            train(config, tmp_path / "run", quiet=True)
    assert len(saved) == 1
    train(config, tmp_path / "run", quiet=True)
    ours, theirs = (
        [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s", "mfu")} for r in found]
        for found in (read_records(w / "metrics.jsonl") for w in (tmp_path / "run", finished[0]))
    )
    assert ours == theirs
    tiny.assert_identical(*(tiny.saved_state(w, config) for w in (tmp_path / "run", finished[0])))


@pytest.mark.parametrize(("groups", "warned"), [("batch", True), ("position", False)])
def test_a_run_whose_routing_leaks_says_so_first(tmp_path, monkeypatch, capsys, groups, warned):
    def stop(*_):
        raise loop_file.Stopped("before the first step")

    monkeypatch.setattr(loop_file, "build_program", lambda *_: None)
    monkeypatch.setattr(loop_file, "_Run", stop)
    config = tiny.tiny(router={"name": "expert_choice", "k": 2}, moe={"groups": groups})
    with pytest.raises(loop_file.Stopped):
        train(config, tmp_path / "run")
    warning = "warning: routing by expert_choice with moe.groups='batch' lets a token's output"
    assert (warning in capsys.readouterr().err) is warned
