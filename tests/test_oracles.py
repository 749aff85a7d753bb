"""No oracle is forgotten: every case is used by a test."""

import ast
import pathlib

from tests.oracle import FOLDER, load


def strings_of_the_tests() -> set[str]:
    here = pathlib.Path(__file__)
    files = [path for path in here.parent.rglob("test_*.py") if path != here]
    assert len(files) > 5
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_every_oracle_is_tested() -> None:
    files = sorted(path.stem for path in FOLDER.glob("*.json"))
    assert len(files) == 10
    cases = {f"{file}/{name}" for file in files for name in load(file)["cases"]}
    assert len(cases) == 47
    assert cases <= strings_of_the_tests()
