"""Attention to the tokens of one's own document: softmax(q k / sqrt(C)) v, with its gradient.

Of all scores nothing is kept for the backward pass but the logarithm of each query's sum: scores
are computed again there (Dao et al. 2022, 2205.14135, algorithm 4). So a layer keeps O(S) numbers
instead of O(S^2).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moejax.model import cudnn


class Mask(NamedTuple):
    """Which of M tokens each of S tokens sees: seen_BSM, bool.

    in_order: M = S and no token sees a later one, so that scores of later ones need no computing.
    """

    seen_BSM: jax.Array
    in_order: bool = False


def attention_mask(
    segment_BS: jax.Array,
    seen_BM: jax.Array | None = None,
    start: jax.Array | int = 0,
    *,
    causal: bool = True,
) -> Mask:
    """A token sees those of its own document; if causal, only those up to itself.

    seen_BM: the documents of all that is there to see, in which the tokens themselves begin at
    `start`; None = the tokens are all.
    """
    alone = seen_BM is None
    seen_BM = segment_BS if seen_BM is None else seen_BM
    same_BSM = segment_BS[:, :, None] == seen_BM[:, None]
    if not causal:
        return Mask(same_BSM)
    place_S, place_M = start + jnp.arange(segment_BS.shape[1]), jnp.arange(seen_BM.shape[1])
    return Mask((place_M[None] <= place_S[:, None])[None] & same_BSM, in_order=alone)


# Where tokens are in order: so many parts of the queries, each against the tokens up to its end.
# That leaves out 3/8 of all scores; 8 parts would leave out 7/16, but of ever smaller products.
PARTS = 4


class _Part(NamedTuple):
    """Queries start .. end, which see no token from `seen` on."""

    start: int
    end: int
    seen: int


class _Cut(NamedTuple):
    """How the queries are cut: into parts, and those into blocks, one after the other."""

    parts: tuple[_Part, ...]
    block: int


def attend(
    q_BSHC: jax.Array, k_BMGC: jax.Array, v_BMGA: jax.Array, mask: Mask, block: int = 0
) -> jax.Array:
    """softmax(q k / sqrt(C)) v, the softmax in float32: y_BSHA. Each kv head serves H / G heads.

    block > 0: that many queries at a time, so that no more than [B, H, block, M] scores are there
    at once. The same values, up to rounding. Where cuDNN's kernel can be used, it is, and holds
    none.
    """
    ours = partial(_by_products, mask.in_order, block)
    arrays = q_BSHC, k_BMGC, v_BMGA, mask.seen_BSM
    if cudnn.takes(*arrays):
        return cudnn.fused(mask.in_order, ours, *arrays)
    return ours(*arrays)


def _by_products(
    in_order: bool,
    block: int,
    q_BSHC: jax.Array,
    k_BMGC: jax.Array,
    v_BMGA: jax.Array,
    seen_BSM: jax.Array,
) -> jax.Array:
    B, S, H, C = q_BSHC.shape
    M, G = k_BMGC.shape[1:3]
    part = S // PARTS
    whole = not in_order or S % PARTS or (block and part > block and part % block)
    parts = [_Part(0, S, M)] if whole else [_Part(i, i + part, i + part) for i in range(0, S, part)]
    # Heads in front: what is multiplied lies together.
    q_BGRSC = jnp.moveaxis(q_BSHC.reshape(B, S, G, H // G, C) * C**-0.5, 1, 3)
    k_BGMC, v_BGMA = jnp.swapaxes(k_BMGC, 1, 2), jnp.swapaxes(v_BMGA, 1, 2)
    return _attend(_Cut(tuple(parts), block), q_BGRSC, k_BGMC, v_BGMA, seen_BSM[:, None, None])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    cut: _Cut, q_BGRSC: jax.Array, k_BGMC: jax.Array, v_BGMA: jax.Array, seen_B11SM: jax.Array
) -> jax.Array:
    return _forward(cut, q_BGRSC, k_BGMC, v_BGMA, seen_B11SM)[0]


def _forward(
    cut: _Cut, q_BGRSC: jax.Array, k_BGMC: jax.Array, v_BGMA: jax.Array, seen_B11SM: jax.Array
) -> tuple[jax.Array, Any]:
    def read(k_BGmC: jax.Array, v_BGmA: jax.Array, _: Any, mine: Any) -> Any:
        """Weights are divided by their sum behind the product with the values: a pass less over
        [s, m]."""
        q_BGRsC, seen_B11sm = mine
        score_BGRsm = _masked(_dot("bgrsc,bgmc->bgrsm", q_BGRsC, k_BGmC), seen_B11sm)
        most_BGRs1 = score_BGRsm.max(-1, keepdims=True)
        weight_BGRsm = jnp.exp(score_BGRsm - most_BGRs1)
        sum_BGRs1 = weight_BGRsm.sum(-1, keepdims=True)
        y_BGRsA = _dot("bgrsm,bgma->bgrsa", weight_BGRsm.astype(v_BGmA.dtype), v_BGmA)
        y_BGRsA = (y_BGRsA / sum_BGRs1).astype(v_BGmA.dtype)
        return (), (y_BGRsA, (most_BGRs1 + jnp.log(sum_BGRs1))[..., 0])

    ys, logs = [], []
    for part in cut.parts:
        seen = partial(read, k_BGMC[:, :, : part.seen], v_BGMA[:, :, : part.seen])
        _, (y_BGRsA, log_BGRs) = _in_blocks(
            cut.block, seen, (), _queries(part, q_BGRSC, seen_B11SM)
        )
        ys.append(y_BGRsA)
        logs.append(log_BGRs)
    B, _, _, S, _ = q_BGRSC.shape
    y_BSHA = jnp.moveaxis(jnp.concatenate(ys, 3), 3, 1).reshape(B, S, -1, v_BGMA.shape[-1])
    kept = q_BGRSC, k_BGMC, v_BGMA, seen_B11SM, y_BSHA, jnp.concatenate(logs, 3)
    return y_BSHA, kept


def _backward(cut: _Cut, kept: Any, dy_BSHA: jax.Array) -> tuple[Any, ...]:
    q_BGRSC, k_BGMC, v_BGMA, seen_B11SM, y_BSHA, log_BGRS = kept
    B, G, R, S, _ = q_BGRSC.shape
    dtype = q_BGRSC.dtype

    def heads_in_front(a_BSHX: jax.Array) -> jax.Array:
        return jnp.moveaxis(a_BSHX.reshape(B, S, G, R, -1), 1, 3)

    # What a query's weights lose together for summing to 1.
    common_BSH = (dy_BSHA.astype(jnp.float32) * y_BSHA.astype(jnp.float32)).sum(-1)
    whole = heads_in_front(dy_BSHA), log_BGRS, heads_in_front(common_BSH)[..., 0]

    def read(k_BGmC: jax.Array, v_BGmA: jax.Array, sums: Any, mine: Any) -> Any:
        """Scores with queries last: so of no product they need to be turned."""
        q_BGRsC, seen_B11sm, dy_BGRsA, *of_queries = mine
        log_BG1Rs, common_BG1Rs = (a_BGRs[:, :, None] for a_BGRs in of_queries)
        dk_BGmC, dv_BGmA = sums
        score_BGmRs = _dot("bgmc,bgrsc->bgmrs", k_BGmC, q_BGRsC)
        weight_BGmRs = jnp.exp(_masked(score_BGmRs, jnp.moveaxis(seen_B11sm, 4, 2)) - log_BG1Rs)
        dv_BGmA += _dot("bgmrs,bgrsa->bgma", weight_BGmRs.astype(dtype), dy_BGRsA)
        dweight_BGmRs = _dot("bgma,bgrsa->bgmrs", v_BGmA, dy_BGRsA)
        dscore_BGmRs = (weight_BGmRs * (dweight_BGmRs - common_BG1Rs)).astype(dtype)
        dk_BGmC += _dot("bgmrs,bgrsc->bgmc", dscore_BGmRs, q_BGRsC)
        # Rounded by the product: in a CPU's program one of these axes cannot give float32.
        dq_BGCRs = jnp.einsum("bgmc,bgmrs->bgcrs", k_BGmC, dscore_BGmRs)
        return (dk_BGmC, dv_BGmA), jnp.moveaxis(dq_BGCRs, 2, 4)

    dqs, sums = [], []
    for part in cut.parts:
        k_BGmC, v_BGmA = k_BGMC[:, :, : part.seen], v_BGMA[:, :, : part.seen]
        none = jax.tree.map(partial(jnp.zeros_like, dtype=jnp.float32), (k_BGmC, v_BGmA))
        mine = _queries(part, q_BGRSC, seen_B11SM) + tuple(
            a[:, :, :, part.start : part.end] for a in whole
        )
        of_part, dq_BGRsC = _in_blocks(cut.block, partial(read, k_BGmC, v_BGmA), none, mine)
        dqs.append(dq_BGRsC)
        sums.append(of_part)
    dk_BGMC, dv_BGMA = jax.tree.map(_summed, *sums)
    return jnp.concatenate(dqs, 3), dk_BGMC.astype(dtype), dv_BGMA.astype(dtype), None


_attend.defvjp(_forward, _backward)


def _masked(score: jax.Array, seen: jax.Array) -> jax.Array:
    return jnp.where(seen, score, -0.7 * jnp.finfo(jnp.float32).max)


def _queries(part: _Part, q_BGRSC: jax.Array, seen_B11SM: jax.Array) -> tuple[jax.Array, ...]:
    queries = slice(part.start, part.end)
    return q_BGRSC[:, :, :, queries], seen_B11SM[:, :, :, queries, : part.seen]


def _summed(*parts: jax.Array) -> jax.Array:
    """The sum of arrays [B, G, m, X], each of the first m tokens of all."""
    if len(parts) == 1:
        return parts[0]
    ends = [a.shape[2] for a in parts]
    return jnp.concatenate(
        [
            sum(a[:, :, start:end] for a in parts[i:])
            for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        ],
        2,
    )


def _in_blocks(
    block: int, step: Callable[[Any, Any], Any], sums: Any, mine: tuple[jax.Array, ...]
) -> tuple[Any, Any]:
    """`step` on so many queries (axis 3) after the other: sums, and what it gives for each."""
    # Nothing in it is differentiated again. But a differentiated scan over layers computes what is
    # the same in all of them once, and keeps it: the mask, for every head.
    step = jax.checkpoint(step, prevent_cse=False)
    queries = mine[0].shape[3]
    if not block or block >= queries:
        return step(sums, mine)

    def cut(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(*a.shape[:3], -1, block, *a.shape[4:]), 3, 0)

    def join(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a, 0, 3).reshape(*a.shape[1:4], queries, *a.shape[5:])

    sums, given = lax.scan(step, sums, jax.tree.map(cut, mine))
    return sums, jax.tree.map(join, given)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
