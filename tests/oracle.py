"""Numbers from other projects' tests: `tests/oracles/README.md` says what each field means."""

import functools
import json
import pathlib
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "oracles"


@functools.cache
def load(file: str) -> dict[str, Any]:
    """One file of the folder, by its name without the ending."""
    return json.loads((FOLDER / f"{file}.json").read_text())


def case(name: str) -> dict[str, Any]:
    """One case by 'file/case'; a fixture that it names stands in `inputs` under its own keys."""
    file, key = name.split("/")
    found = load(file)["cases"][key]
    if "fixture" in found["inputs"]:
        arrays = load("loss_definitions")["fixtures"][found["inputs"]["fixture"]]
        found = {**found, "inputs": {**arrays, **found["inputs"]}}
    return found


def check(found: dict[str, Any], key: str, got: Any, want: Any = None) -> None:
    """Asserts |got - want| <= tol max(1, |want|), tol being the case's own for the dotted key."""
    if want is None:
        want = functools.reduce(lambda tree, part: tree[part], key.split("."), found["expected"])
    tolerance = found["tolerance"].get(key, found["tolerance"]["default"])
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{key}: shape {got.shape}, expected {want.shape}"
    limit = tolerance * np.maximum(1.0, np.abs(want))
    assert np.all(np.abs(got - want) <= limit), f"{key}: got {got}, expected {want} +- {tolerance}"
