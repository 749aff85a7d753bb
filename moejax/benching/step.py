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
      peer: Hugging Face's Mixtral on the same batches, a step of each in turns; None where it is
        not installed, or not asked for.
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
    """Steps on real text, as training runs them, each followed by one of the peer's."""
    made = config()
    dataset = open_dataset(made.data)
    theirs = mixtral_step(made, dataset.vocab_size) if peer else None
    start = time.perf_counter()
    program = build_program(made, dataset.vocab_size, len(dataset.domains))
    state: Any = program.init(0, dataset.count_V)
    batches = dataset.train_batches(0, seed=0, share=program.rows)
    taken, waited, peers, first_seconds = [], [], [], 0.0
    for number in range(3 * repeats + 1):
        begin = time.perf_counter()
        batch, _ = next(batches)
        given = jax.block_until_ready(program.put(batch))
        ready = time.perf_counter()
        state, metrics = program.train_step(state, given)
        jax.block_until_ready((state, metrics))
        end = time.perf_counter()
        if theirs:
            theirs(batch.tokens_BS, batch.targets_BS)
        if not number:
            first_seconds = end - start
            continue
        taken.append(end - ready)
        waited.append(ready - begin)
        peers.append(time.perf_counter() - end)
    tokens = made.data.batch * made.data.sequence
    middle = _middle(taken)
    return Step(
        *middle,
        tokens_per_s=tokens / middle[0],
        mfu=tokens * program.size.flops / middle[0] / peak_flops(),
        input_share=float(np.median(np.array(waited) / np.array(taken))),
        compile_seconds=program.compile_seconds,
        first_seconds=first_seconds,
        temp_bytes=_temp_bytes(program.train_step),
        peer=_peer(taken, peers, tokens) if theirs else None,
    )


def _middle(seconds: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    middle, low, high = np.quantile(seconds, (0.5, 0.25, 0.75))
    return float(middle), float(low), float(high)


def _peer(ours: list[float], theirs: list[float], tokens: int) -> Peer:
    middle = _middle(theirs)
    ratio = float(np.median(np.array(theirs) / np.array(ours)))
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
