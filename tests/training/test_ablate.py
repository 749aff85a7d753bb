"""Bits per byte of a saved run without experts."""

import numpy as np
import pytest

from moejax.training.ablate import ablate
from moejax.training.evaluate import evaluate
from moejax.training.saved import open_run


@pytest.fixture(scope="module")
def run(finished):
    return open_run(finished[0], progress=False)


@pytest.fixture(scope="module")
def found(run):
    """On rows of no known domain: they count too."""
    rows = run.dataset.validation_batches(limit_rows=16)
    return ablate(run, [b._replace(domain_B=np.full_like(b.domain_B, -1)) for b in rows])


def test_without_nothing_it_is_the_evaluation(run, found):
    assert found["whole"] == pytest.approx(
        evaluate(run.config, run.program, run.state, run.dataset)["bpb"], rel=1e-6
    )


def test_an_expert_that_a_token_has_not_is_not_missed(found):
    assert [found["other"], *found["other_layer"]] == pytest.approx([found["whole"]] * 3, rel=1e-6)


def test_one_that_it_has_changes_what_it_costs(found):
    assert len(found["rank"]) == 2 and len(found["rank_0_layer"]) == 2
    costs = [*found["rank"], *found["rank_0_layer"], found["chosen"], *found["chosen_layer"]]
    assert np.isfinite(costs).all()
    assert (np.abs(np.array(costs) - found["whole"]) > 1e-6).all()
    # In one layer alone is not what it is in both, nor in the other.
    assert len(set(np.round([*found["rank_0_layer"], *found["rank"]], 6))) == 4
