"""`moejax.dependence`: what it says of each router is what the README shows."""

import pathlib

import jax
import pytest

import moejax
from moejax.causality import dependence
from moejax.moe import MoeOptions
from moejax.routers import causal, found, measured
from moejax.routing import ROUTERS, RouterInput, Routing, make_router, token_choice

README = pathlib.Path(__file__).parent.parent / "README.md"


def table() -> dict[str, dict[str, str]]:
    """router -> column -> cell, of the README's table of causality."""
    lines = README.read_text().splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("| router | nothing dropped"))
    end = lines.index("", start)
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[start:end]]
    columns = cells[0][1:]
    return {row[0].strip(): dict(zip(columns, row[1:], strict=True)) for row in cells[2:]}


def test_every_router_stands_in_the_table() -> None:
    assert list(table()) == list(ROUTERS)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_table_is_what_is_measured(name: str) -> None:
    row = table()[name]
    d = measured(name, "nothing dropped")
    assert found(d) == row["nothing dropped"]
    if causal(ROUTERS[name]) == "yes":
        assert not any(d)
    else:
        assert d.later or d.others
        alone = measured(name, "evaluation, nothing dropped")
        assert found(alone) == row["evaluation, nothing dropped"]
        assert any(alone) == (causal(ROUTERS[name]) == "no")


@pytest.mark.parametrize("column", ["capacity 1 a sequence", "capacity 1 a batch"])
def test_a_capacity_couples_tokens(column: str) -> None:
    for name in ("switch", "topk"):
        assert found(measured(name, column)) == table()[name][column]


def neighbour(r: RouterInput, *, ahead: int = 1) -> Routing:
    """Top-1 by the logits of the token `ahead` places on: a leak that its gradient shows."""
    logits_TE = jax.numpy.roll(r.logits_TE, -ahead, axis=0)
    probs_TE = jax.nn.softmax(logits_TE)
    weight_TK, expert_TK = jax.lax.top_k(probs_TE, 1)
    return token_choice(r, expert_TK, weight_TK, probs_TE)


def test_a_leak_through_the_weights_shows_in_the_gradient_too() -> None:
    ahead = dependence(MoeOptions(make_router(neighbour), groups="sequence"), 4)
    assert ahead.later and ahead.later_gradient and not ahead.causal
    back = MoeOptions(make_router(neighbour, {"ahead": -1}), groups="sequence")
    # The first token looks at the last one: rolled round the end.
    assert dependence(back, 4).later
    assert not dependence(MoeOptions(make_router("topk"), groups="sequence"), 4).later


def test_it_is_public() -> None:
    assert moejax.dependence is dependence
