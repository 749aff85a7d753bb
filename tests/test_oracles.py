"""No oracle is forgotten: every case is either used by a test or named here as not yet."""

import ast
import pathlib

from tests.oracle import FOLDER, load

# 'file/case' = nothing of it is tested; 'file/case.key' = the other expected values are.
NOT_YET = (
    # Utilisation by percentile is not a metric of this library (max_vio is its maximum less 1).
    "metrics/automodel_uniform.utilisation_p25",
    "metrics/automodel_uniform.utilisation_p75",
    "metrics/automodel_uniform.utilisation_median",
    "metrics/automodel_percentiles.utilisation_p25",
    "metrics/automodel_percentiles.utilisation_p75",
    # The entropy of no load at all: 0 there by definition; here no forward pass gives it.
    "metrics/automodel_all_zero.diversity",
)


def strings_of_the_tests() -> set[str]:
    here = pathlib.Path(__file__)
    files = [path for path in here.parent.rglob("test_*.py") if path != here]
    assert len(files) > 5
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_every_oracle_is_tested_or_named_as_not_yet() -> None:
    files = sorted(path.stem for path in FOLDER.glob("*.json"))
    assert len(files) == 10
    cases = {f"{file}/{name}" for file in files for name in load(file)["cases"]}
    assert len(cases) == 47
    whole = {name for name in NOT_YET if "." not in name}
    assert whole <= cases
    tested = cases & strings_of_the_tests()
    assert cases - tested == whole


def test_what_is_not_yet_exists() -> None:
    for name in NOT_YET:
        full, _, key = name.partition(".")
        file, case_name = full.split("/")
        assert not key or key in load(file)["cases"][case_name]["expected"], name
