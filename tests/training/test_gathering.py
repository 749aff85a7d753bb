"""A saved run as a page: from the command to the numbers on it. Here, where a run is saved."""

import json
import re

import numpy as np
import pytest

from moejax.training.checkpoint import Checkpoints
from moejax.training.optimizer import make_optimizer
from moejax.training.saved import open_run
from moejax.training.state import init_state
from moejax.training.traced import trace_text
from moejax.view import asked, read_text
from moejax.viewing import pack, page
from moejax.viewing.gathering import gather, names
from tests import tiny

TEXT = "def f(é):\n    return x\n"


@pytest.fixture(scope="module")
def panel(finished):
    return gather("here", finished[0], None, TEXT, tokens=2000)


def test_a_text_is_shown_as_the_run_routes_it(finished, panel) -> None:
    trace = trace_text(open_run(finished[0], progress=False), TEXT)
    np.testing.assert_array_equal(panel.trace.expert_TLR, trace.expert_TLR)
    assert panel.title == "here, step 12" and "".join(panel.piece_T) == TEXT
    assert panel.target_T[:3] == ["e", "f", " "] and len(panel.guess_T) == len(trace)
    assert panel.sizes.choices == 2 and 0 < panel.sizes.active < panel.sizes.total
    assert panel.facts == {
        "router": "loss_free (bias_rate 0.01)",
        "balance losses": "none",
        "capacity": "no limit",
    }


def test_loads_of_the_training_are_over_an_even_share(panel) -> None:
    assert panel.history.step_H.tolist() == [2, 4, 6, 8, 10, 12]
    assert panel.history.load_HLE.shape == (6, 2, 4)
    np.testing.assert_allclose(panel.history.load_HLE.mean(-1), 1, atol=1e-6)


def test_validation_text_of_all_domains_is_the_default(finished) -> None:
    panel = gather("here", finished[0], None, None, tokens=100)
    assert len(panel.trace) == len(panel.piece_T) == 100
    assert set(panel.trace.domain_T) == {0, 1}
    data = page([panel], "x").partition('type="application/json">')[2].partition("</script>")[0]
    assert json.loads(data)["panels"] == pack([panel])["panels"]


def test_a_run_without_routing_is_refused_in_one_line(tmp_path) -> None:
    config = tiny.tiny(moe={"experts": 0})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(
        init_state(0, config=config, vocab_size=tiny.VOCABULARY, optimizer=optimizer), {}, None
    )
    checkpoints.close()
    with pytest.raises(ValueError, match="no layer of this model routes"):
        gather("dense", tmp_path, None, TEXT, tokens=10)


def test_names_are_as_short_as_they_differ(tmp_path) -> None:
    assert names([tmp_path / "a/seed0", tmp_path / "b/seed0"]) == ["a/seed0", "b/seed0"]
    assert names([tmp_path / "a/seed0"] * 2) == ["seed0", "seed0"]


def test_what_the_command_line_means(tmp_path) -> None:
    panels = asked(["a"], ["120", "240"])
    assert [(str(run), step) for run, step in panels] == [("a", 120), ("a", 240)]
    assert [step for _, step in asked(["a", "b"], [])] == [None, None]
    for arguments, steps, told in (
        ([], [], "usage"),
        (["a", "b"], ["1"], "1 steps for 2 runs"),
        (["a"], ["x"], "'x' is no step"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            asked(arguments, steps)
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="empty is empty: there is no token"):
        read_text(str(tmp_path / "empty"), None)
    with pytest.raises(ValueError, match="not both"):
        read_text("a", "b")
    assert read_text(None, None) is None and read_text(None, "x") == "x"
