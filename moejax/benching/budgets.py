"""What was measured, beside what must be reached."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moejax.benching.layer import Measured
from moejax.benching.shapes import EIGHT, LARGE, SIXTEEN
from moejax.benching.show import Row

if TYPE_CHECKING:
    from moejax.benching.step import Step


def layer_budgets(lines: Sequence[Measured]) -> list[Row]:
    """Of the layer: ratios of medians over turns."""
    share = {(line.case, line.way): line.share for line in lines if line.both}

    def over(case: str, way: str, other: str) -> float | None:
        found = share.get((case, way)), share.get((case, other))
        return None if found[0] is None or found[1] is None else found[0] / found[1]

    large, eight, sixteen = LARGE.name, EIGHT.name, SIXTEEN.name
    overhead = over(large, "layer", "experts")
    wanted = [
        ("dropless / dense, uniform load", over(large, "dropless", "dense"), 0.9),
        ("dropless / dense, Zipf load", over("large, skewed", "dropless", "dense"), 0.7),
        ("dropless / dense, fine-grained", over("fine-grained", "dropless", "dense"), 0.9),
        ("dropless / lax.ragged_dot, E=8", over(eight, "dropless", "ragged_dot"), 5),
        ("gather / one-hot einsum, E=16", over(sixteen, "gather", "einsum"), 3),
    ]
    rows = [Row(what, r, f">= {least}", r >= least) for what, r, least in wanted if r is not None]
    if overhead is not None:
        lost = 1 - overhead
        rows.append(Row("router + dispatch + combine, share", lost, "<= 0.15", lost <= 0.15))
    return rows


def step_budgets(whole: "Step | None") -> list[Row]:
    """The whole step beside the peer's, where both were measured."""
    if whole is None or whole.peer is None:
        return []
    ratio = whole.peer.ours
    return [Row("training step / HF Mixtral's", ratio, ">= 1.5", ratio >= 1.5)]
