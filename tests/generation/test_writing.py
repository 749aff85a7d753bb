"""Writing with a run: greedy is the largest logit of repeated passes, whatever the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import Config
from moejax.generation.traced import save_trace, trace_written
from moejax.generation.writing import Written, write, writing_config
from moejax.tracing import open_trace
from moejax.training.program import Program, build_program
from moejax.training.saved import SavedRun
from moejax.training.state import make_graph
from tests import tiny

TOKENS = 6
PROMPTS = [np.frombuffer(text, np.uint8) for text in (b"def f", b"the", b"a longer one")]


def program_on(devices: int, **mesh: int) -> tuple[Config, Program]:
    # A capacity that binds, and buffers: writing has neither.
    config = tiny.tiny(router=tiny.LOSS_FREE, moe={"capacity_factor": 0.5}, mesh=mesh)
    chosen = tuple(jax.devices()[:devices])
    return config, build_program(config, tiny.VOCABULARY, 2, chosen, training=False)


@pytest.fixture(scope="module")
def run() -> SavedRun:
    """At step 0, on one device."""
    config, program = program_on(1)
    return SavedRun(config, tiny.dataset(), program, program.init(3))


@pytest.fixture(scope="module")
def greedy(run: SavedRun) -> Written:
    return write(run, PROMPTS, tokens=TOKENS)


def test_greedy_is_the_largest_logit_of_repeated_passes(run: SavedRun, greedy: Written) -> None:
    config = writing_config(run.config, 1, 1)
    graph, length = make_graph(config, tiny.VOCABULARY), max(map(len, PROMPTS)) + TOKENS

    @jax.jit
    def last(token_1S, size):  # padded behind, which nothing before it sees
        model = nnx.merge(graph, run.state.params)
        logits_1SV, _ = model(token_1S, router_state=run.state.router_state)
        return logits_1SV[0, size - 1].argmax()

    for prompt, written in zip(PROMPTS, greedy.token_ids, strict=True):
        ids = list(prompt)
        for _ in range(TOKENS):
            padded_1S = jnp.asarray([ids + [0] * (length - len(ids))], jnp.int32)
            ids.append(int(last(padded_1S, len(ids))))
        assert ids[len(prompt) :] == written.tolist()
    assert len({*np.concatenate(greedy.token_ids).tolist()}) > 2  # not one token for ever


def test_a_mesh_of_eight_writes_the_same(run: SavedRun, greedy: Written) -> None:
    config, program = program_on(8, data=2, expert=2, tensor=2)
    where = jax.tree.map(lambda a: a.sharding, program.abstract_state)
    spread = SavedRun(config, run.dataset, program, jax.device_put(run.state, where))
    written = write(spread, PROMPTS, tokens=TOKENS)
    assert [ids.tolist() for ids in written.token_ids] == [ids.tolist() for ids in greedy.token_ids]


def test_draws_repeat_by_seed_and_row(run: SavedRun, greedy: Written) -> None:
    def drawn(seed: int) -> list[list[int]]:
        warm = {"temperature": 2.0, "top_p": 0.9}
        return [
            ids.tolist() for ids in write(run, PROMPTS, tokens=TOKENS, seed=seed, **warm).token_ids
        ]

    first = drawn(0)
    assert drawn(0) == first != drawn(1)
    assert first != [ids.tolist() for ids in greedy.token_ids]
    assert write(run, PROMPTS, tokens=TOKENS).compile_seconds < 1  # the same program


def test_a_separator_ends_a_text(run: SavedRun) -> None:
    params = jax.tree.map(lambda a: a, run.state.params)
    params["unembed_DV"] = jnp.zeros_like(params["unembed_DV"])  # all alike: id 0 is the first
    ended = run._replace(state=run.state._replace(params=params))
    assert [len(ids) for ids in write(ended, PROMPTS, tokens=TOKENS).token_ids] == [0, 0, 0]


def test_the_trace_is_of_what_was_written(run: SavedRun, greedy: Written, tmp_path) -> None:
    save_trace(tmp_path, trace_written(run, PROMPTS, greedy), PROMPTS)
    files = open_trace(tmp_path)
    assert files.info["prompt_tokens"] == [5, 3, 12]
    part = files.part(1)
    texts = [[*prompt, *ids] for prompt, ids in zip(PROMPTS, greedy.token_ids, strict=True)]
    assert part.trace.token_T.tolist() == [token for text in texts for token in text]
    assert part.tokens_B.tolist() == [len(text) for text in texts]
    assert not part.trace.dropped_TLR.any()  # though a capacity of .5 would
    # What it guesses behind the prompt is what was written.
    ends = np.cumsum([len(text) for text in texts])
    for end, ids in zip(ends, greedy.token_ids, strict=True):
        assert part.trace.predicted_T[end - TOKENS - 1 : end - 1].tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"moe": {"slots": 2}}, r"moe\.slots=2 \(Soft MoE\) mixes each token with later ones"),
        (
            {"router": {"name": "expert_choice", "k": 2}, "moe": {"groups": "sequence"}},
            r"'expert_choice' with groups='sequence' looks at later .*eval_groups='position'",
        ),
        (
            # An expert takes ceil(1 T / 4) of T tokens: T = 3 is less than one.
            {"router": {"name": "expert_choice", "k": 1}, "moe": {"groups": "position"}},
            r"1 x 3 / 4 < 1; each group needs at least 4 tokens; .* one token of each of 3 prompts",
        ),
    ],
)
def test_who_cannot_write_says_why(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        writing_config(tiny.tiny(**sections), 3, 3)


def test_prompts_that_are_compared_must_fill_the_mesh() -> None:
    config = tiny.tiny(router={"name": "expert_choice", "k": 1}, moe={"groups": "position"})
    with pytest.raises(ValueError, match=r"5 are not divisible by .*; give 8"):
        writing_config(config, 5, 8)


def test_a_dense_model_writes() -> None:
    config = writing_config(tiny.tiny(moe={"experts": 0}), 3, 4)
    assert config.data.batch == 4 and not dataclasses.asdict(config.moe)["experts"]
