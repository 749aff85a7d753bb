"""What a model does without, against a model that never had it. What a run records of it is in
`test_analyze`."""

import jax
import pytest

from moejax.training.ablate import without
from moejax.training.evaluate import evaluate
from moejax.training.program import build_program
from tests import tiny

DOMAINS = 2


def test_without_the_shared_expert_it_is_a_model_that_has_none():
    """Weights that are cut over a mesh, against that model's own program on one device."""
    moe, router = {"experts": 8, "shared": 1}, {"name": "topk", "k": 2}
    config = tiny.tiny(moe=moe, router=router, mesh={"data": 2, "fsdp": 2, "expert": 2})
    alone = tiny.tiny(moe={**moe, "shared": 0}, router=router)
    program = build_program(config, tiny.VOCABULARY, DOMAINS, training=False)
    one = (jax.devices()[0],)
    other = build_program(alone, tiny.VOCABULARY, DOMAINS, one, training=False)
    state = program.init(0)
    found = without(config, program, state, tiny.dataset())["without"]
    assert list(found) == ["shared", "best_0.125", "best_0.25"]  # 1/16 of 8 is none
    assert len(set(found.values())) == 3

    params = jax.device_get(state.params)
    for unit in params["stacks"].values():
        for block in unit["blocks"].values():
            del block["feed_forward"]["shared"]
    assert jax.tree.structure(params) == jax.tree.structure(other.abstract_state.params)
    record = evaluate(alone, other, state._replace(params=params), tiny.dataset())
    assert found["shared"] == pytest.approx(record["bpb"], rel=1e-5)


def test_a_dense_model_has_nothing_to_do_without():
    dense = tiny.tiny(moe={"experts": 0}, train={"eval_without": True})
    program = build_program(dense, tiny.VOCABULARY, DOMAINS, training=False)
    assert without(dense, program, program.abstract_state, tiny.dataset()) == {}
