"""Compiled programs are made of what is recorded: no benchmark, so no seconds and no flakiness."""

import json
import re

import pytest

from tests import structure

RECORDED = json.loads(structure.FILE.read_text())


@pytest.mark.parametrize("case", structure.CASES)
def test_a_program_is_what_it_was(case: str) -> None:
    found = structure.structure(structure.CASES[case]())
    assert structure.VERSION in RECORDED, "run `python -m tests.structure` with this JAX once"
    known = RECORDED[structure.VERSION][case]
    for inexact, tolerance in (("flops", 0.02), ("temp_bytes", 0.1)):
        assert found.pop(inexact) == pytest.approx(known.pop(inexact), rel=tolerance), inexact
    assert found == known, "where this is meant, `python -m tests.structure` records it"


def test_a_deeper_model_is_the_same_program() -> None:
    """Layers are scanned: what is to be compiled does not grow, only its arrays do."""

    two, many = (re.sub(r"\d+", "", structure.step(n).as_text()) for n in (2, 16))
    assert len(many) == pytest.approx(len(two), rel=0.01)
    assert two.count("stablehlo.dot_general") == many.count("stablehlo.dot_general") > 10


def test_the_old_state_s_buffers_become_the_new_one_s() -> None:
    """Donation: what a step is given besides the batch, it gives back in place."""
    memory = structure.compiled_step().memory_analysis()
    assert memory.alias_size_in_bytes > 0.95 * memory.output_size_in_bytes > 0
