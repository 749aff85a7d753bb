"""The whole training step: tokens/s, MFU, the input pipeline's share, and the time to start."""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax.benching.peer_step import mixtral_step
from moejax.config import Config, default_config, override
from moejax.data import open_dataset
from moejax.sharding import make_mesh
from moejax.training.hardware import peak_flops
from moejax.training.program import build_program, lay_out, lower_train_step

VOCABULARY = 256
SIZES = {
    "model.layers": 4,
    "model.dim": 128,
    "model.heads": 4,
    "model.ffn": 256,
    "moe.experts": 8,
    "router.k": 2,
    "data.sequence": 256,
    "data.batch": 16,
}
DEPTHS = (4, 16, 64)
# Steps of each in a turn. The first of them is not counted, neither ours nor the peer's: it finds
# caches and memory as the other has left them, which training does not.
TURN = 5


class Step(NamedTuple):
    """A training step of the model of `SIZES`, dropless, AdamW.

    Attributes:
      seconds: of a step, median; low, high: quartiles.
      tokens_per_s, mfu: the latter of the active parameters' FLOPs, at the device's peak.
      input_share: seconds to make a batch and put it on the device, over those of a step; the loop
        makes the next batch while the device works.
      compile_seconds: of the training step.
      first_seconds: from nothing, the text being prepared, to the end of the first step.
      temp_bytes: of the training step, on one device.
      peer: Hugging Face's Mixtral on batches of the same text, `TURN` steps of each in turns; None
        where it is not installed, or not asked for.
    """

    seconds: float
    low: float
    high: float
    tokens_per_s: float
    mfu: float
    input_share: float
    compile_seconds: float
    first_seconds: float
    temp_bytes: int
    peer: "Peer | None"


class Peer(NamedTuple):
    """A peer's training step. `ours`: how many times as fast ours is, the median over turns."""

    name: str
    seconds: float
    low: float
    high: float
    tokens_per_s: float
    ours: float


def config() -> Config:
    changes = {**SIZES, "router.name": "topk", "train.steps": 1000}
    return Config.from_dict(override(default_config(), changes))


def measure(repeats: int, peer: bool) -> Step:
    """Steps on real text, as training runs them, in turns with the peer's."""
    made = config()
    dataset = open_dataset(made.data)
    theirs = mixtral_step(made, dataset.vocab_size) if peer else None
    start = time.perf_counter()
    program = build_program(made, dataset.vocab_size, len(dataset.domains))
    state: Any = program.init(0, dataset.count_V)
    batches = dataset.train_batches(0, seed=0, share=program.rows)

    def step() -> tuple[float, float]:
        """Seconds to make a batch, and of the step."""
        nonlocal state
        begin = time.perf_counter()
        given = jax.block_until_ready(program.put(next(batches)[0]))
        ready = time.perf_counter()
        state, metrics = program.train_step(state, given)
        jax.block_until_ready((state, metrics))
        return ready - begin, time.perf_counter() - ready

    def peers_step() -> float:
        assert theirs is not None
        batch, _ = next(batches)
        begin = time.perf_counter()
        theirs(batch.tokens_BS, batch.targets_BS)
        return time.perf_counter() - begin

    step()
    first_seconds = time.perf_counter() - start
    waited_nt, taken_nt, peers_nt = [], [], []  # by turn
    for _ in range(repeats):
        waited, taken = zip(*[step() for _ in range(TURN)][1:], strict=True)
        waited_nt.append(waited)
        taken_nt.append(taken)
        if theirs:
            peers_nt.append([peers_step() for _ in range(TURN)][1:])
    tokens = made.data.batch * made.data.sequence
    middle = _middle(taken_nt)
    return Step(
        *middle,
        tokens_per_s=tokens / middle[0],
        mfu=tokens * program.size.flops / middle[0] / peak_flops(),
        input_share=float(np.median(np.array(waited_nt) / np.array(taken_nt))),
        compile_seconds=program.compile_seconds,
        first_seconds=first_seconds,
        temp_bytes=_temp_bytes(program.train_step),
        peer=_peer(taken_nt, peers_nt, tokens) if theirs else None,
    )


def _middle(seconds: Any) -> tuple[float, float, float]:
    """Median and quartiles."""
    middle, low, high = np.quantile(seconds, (0.5, 0.25, 0.75))
    return float(middle), float(low), float(high)


def _peer(ours_nt: Any, theirs_nt: Any, tokens: int) -> Peer:
    middle = _middle(theirs_nt)
    ratio = float(np.median(np.sum(theirs_nt, 1) / np.sum(ours_nt, 1)))
    return Peer("HF Mixtral", *middle, tokens_per_s=tokens / middle[0], ours=ratio)


def _temp_bytes(step: Any) -> int:
    return int(step.func.memory_analysis().temp_size_in_bytes)  # behind its coefficients


def compile_seconds(layers: int) -> float:
    """To trace, lower and compile the training step of so many layers."""
    made = config()
    made = dataclasses.replace(made, model=dataclasses.replace(made.model, layers=layers))
    start = time.perf_counter()
    lower_train_step(made, VOCABULARY, lay_out(made, VOCABULARY, make_mesh(made.mesh))).compile()
    return time.perf_counter() - start
