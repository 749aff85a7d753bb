"""Saturation: what a layer chose early of what it chooses at the end. By hand, and of a run."""

import json

import numpy as np

from moejax.tracing import Trace, TraceMeta, open_trace
from moejax.training.settling import keep, saturation
from tests.training.test_records import events


def trace(expert_TLR) -> Trace:
    """Of these experts of four; what else there is does not matter."""
    experts = np.asarray(expert_TLR, np.uint8)
    tokens, layers = experts.shape[:2]
    ids, empty = np.arange(tokens, dtype=np.int32), np.zeros((tokens, layers), np.float32)
    return Trace(
        TraceMeta(4, tuple(range(layers))),
        *(ids, ids, ids, np.zeros_like(ids), ids, experts),
        *(np.ones(experts.shape, np.float32), np.zeros(experts.shape, bool), empty, empty),
    )


# Two tokens, two layers, two choices; 4 = nowhere.
LAST = trace([[[0, 1], [2, 4]], [[2, 3], [1, 0]]])
# Of layer 0, {0, 1} and {1, 2} share 1, {2, 3} and {0, 1} none: 1 of 4. Of layer 1, {2} is in
# {2, 3}, and {1, 0} is {0, 1}: 3 of 3.
EARLY = trace([[[1, 2], [2, 3]], [[0, 1], [0, 1]]])


def test_evaluations_are_kept_and_held_to_the_last(tmp_path) -> None:
    keep(tmp_path, 10, LAST)
    assert saturation(tmp_path) == {}
    keep(tmp_path, 20, EARLY)
    keep(tmp_path, 100, LAST)
    keep(tmp_path, 10, EARLY)  # made again
    keep(tmp_path, 30, EARLY[:1])  # of other tokens
    keep(tmp_path, 40, EARLY)
    (tmp_path / "evaluations/00000040/00000001-00000001.npz").unlink()
    found = saturation(tmp_path)
    assert found["step"] == [10, 20] and found["saturation_SL"] == [[0.25, 1.0]] * 2
    assert found["tokens"] == 2 and found["floor"] == 2 / 4


def test_a_run_says_how_early_it_settled(finished) -> None:
    workdir, summary = finished
    steps = [5, 10, 12]
    folders = sorted((workdir / "evaluations").iterdir())
    assert [int(folder.name) for folder in folders] == steps
    found = summary["saturation"]
    assert found["step"] == steps[:2] and found["floor"] == 0.5
    assert found["tokens"] == len(open_trace(folders[-1]).read()) > 400
    assert min(found["saturation_SL"][0]) > 0 and np.max(found["saturation_SL"]) <= 1
    assert json.loads((workdir / "summary.json").read_text())["saturation"] == found
    board = events(workdir / "tensorboard")
    shown = [value for _, value in board["eval/saturation_L/1"]]
    np.testing.assert_allclose(shown, [layers[1] for layers in found["saturation_SL"]], rtol=1e-6)
    assert [step for step, _ in board["eval/load"]] == steps
    assert len(board["train/max_vio_L/0"]) == len(board["train/max_vio"])
