"""Panels made by hand, or of random routers of any size: what the tests of the page look at."""

import numpy as np

from moejax.tracing import Trace, TraceMeta
from moejax.viewing import History, Panel, Sizes
from moejax.viewing.pieces import pieces

TEXT = "ab <b>cd</b>\n\té & x\n" + "def f(x):\n    return x\n" * 2
SIZES = Sizes(dim=8, ffn=16, total=46_000, active=12_000, choices=2.0)


def panel(
    run: str = "free",
    step: int = 240,
    *,
    seed: int = 0,
    experts: int = 4,
    layers: int = 2,
    k: int = 2,
    tokens: int = 0,
    collapsed: bool = False,
) -> Panel:
    """A softmax router with random logits over bytes of text; token 2 finds its first expert full,
    token 3 of the lowest layer has no expert."""
    rng = np.random.default_rng(seed)
    ids = np.frombuffer((TEXT * (1 + tokens // 60)).encode(), np.uint8).astype(np.int32)
    ids = ids[: tokens + 1] if tokens else ids
    count = len(ids) - 1
    logits_TLE = rng.normal(size=(count, layers, experts)).astype(np.float32) * 1.5
    scores_TLE = np.exp(logits_TLE) / np.exp(logits_TLE).sum(-1, keepdims=True)
    expert_TLR = np.argsort(-scores_TLE, axis=-1)[..., :k].astype(np.uint8)
    sorted_TLE = -np.sort(-scores_TLE, axis=-1)
    weight_TLR = sorted_TLE[..., :k].copy()
    dropped_TLR = np.zeros(expert_TLR.shape, bool)
    dropped_TLR[2, :, 0] = True
    expert_TLR[3, 0], weight_TLR[3, 0] = experts, 0
    document_T = np.arange(count, dtype=np.int32) // 20
    trace = Trace(
        meta=TraceMeta(experts, tuple(range(1, 2 * layers, 2)), ("code", "prose"), 256, "bytes"),
        token_T=ids[:-1],
        target_T=ids[1:],
        position_T=np.arange(count, dtype=np.int32) % 20,
        document_T=document_T,
        domain_T=document_T % 2,
        expert_TLR=expert_TLR,
        weight_TLR=weight_TLR,
        dropped_TLR=dropped_TLR,
        entropy_TL=-(scores_TLE * np.log(scores_TLE)).sum(-1),
        margin_TL=sorted_TLE[..., k - 1] - sorted_TLE[..., k],
        predicted_T=ids[:-1],
        scores_TLE=scores_TLE.astype(np.float16),
    )
    piece_T = pieces(decode, ids[:-1], document_T)
    alone_T = [decode([token]) for token in ids.tolist()]
    return Panel(
        run, step, trace, piece_T, alone_T[1:], alone_T[:-1], {"router": "topk"}, SIZES,
        history(experts, layers, collapsed),
    )  # fmt: skip


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def history(experts: int, layers: int, collapsed: bool) -> History:
    """From balance to balance, or to all of it at expert 1, in five records."""
    part_H = np.linspace(0, float(collapsed), 5, dtype=np.float32)
    load_HLE = np.ones((5, layers, experts), np.float32) * (1 - part_H[:, None, None])
    load_HLE[:, :, 1] += part_H[:, None] * experts
    return History(np.arange(10, 60, 10, dtype=np.int32), load_HLE)
