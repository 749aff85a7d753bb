"""A suite refuses what its runner or its report could not use."""

import json
from pathlib import Path

import pytest

from moejax.reporting import Claim, Suite, less, load

CLAIM = Claim("A", "b < dense", "source", "S", less("eval.bpb", "b", "dense"))
VARIANTS = {"dense": {"moe.experts": 0}, "b": {"router.name": "switch"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "c"}, "baseline 'c' is none of dense, b"),
        ({"seeds": (0, 0)}, r"seeds \(0, 0\)"),
        ({"seeds": ()}, "seeds"),
        ({"claims": (CLAIM, CLAIM)}, r"claims \['A'\]"),
        ({"descriptions": {"c": "?"}}, r"unknown variants \['c'\]"),
        ({"unmatched": {"c": "larger"}}, r"unmatched of unknown variants \['c'\]"),
        ({"variants": {"dense": {}, "a/b": {}}}, r"\['a/b'\] cannot name a directory"),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    good = {"name": "s", "question": "q", "scale": "smoke", "variants": VARIANTS}
    Suite(**good)
    with pytest.raises(ValueError, match=message):
        Suite(**{**good, **change})


def test_suite_json_is_what_results_read(tmp_path: Path) -> None:
    suite = Suite("s", "Why?", "smoke", VARIANTS, {"b": "the b arm"}, seeds=(3, 4))
    (tmp_path / "suite.json").write_text(json.dumps(suite.to_json()))
    results = load(tmp_path)
    assert (results.name, results.question, results.seeds) == ("s", "Why?", (3, 4))
    assert results.variants == {"dense": "", "b": "the b arm"}
    assert set(results.incomplete.values()) == {"not started"}
