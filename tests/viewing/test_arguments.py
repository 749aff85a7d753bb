"""What the command line means, and what it refuses."""

import re

import pytest

from moejax.viewing.arguments import asked, read_text


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
