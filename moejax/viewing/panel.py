"""What the page shows of one model at one checkpoint."""

import dataclasses

import numpy as np

from moejax.tracing import Trace


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of the model for its pictures.

    Attributes:
      dim, ffn: D, and F of one expert.
      total, active: parameters, and those that work on one token.
      choices: experts a token, K; a mean where experts choose.
      shared: experts that every token uses besides.
    """

    dim: int
    ffn: int
    total: int
    active: int
    choices: float
    shared: int = 0


@dataclasses.dataclass(frozen=True)
class History:
    """Loads over the training.

    Attributes:
      step_H: int32, rising.
      load_HLE: float32, over an even share: 1 = balanced, E = all to one expert.
    """

    step_H: np.ndarray
    load_HLE: np.ndarray


@dataclasses.dataclass(frozen=True)
class Panel:
    """One model over the text.

    Attributes:
      run: the training's name. The experts of one run's checkpoints are the same experts.
      step: of the checkpoint.
      trace: with its scores, of the text.
      piece_T, target_T, guess_T: text of each token, of the one that follows, and of the model's
        best guess; "" where a token is a part of a character that a later one completes.
      facts: name -> what else to know about the model.
      sizes: see there.
      history: None = the run recorded no loads.
    """

    run: str
    step: int
    trace: Trace
    piece_T: list[str]
    target_T: list[str]
    guess_T: list[str]
    facts: dict[str, str]
    sizes: Sizes
    history: History | None = None

    @property
    def title(self) -> str:
        return f"{self.run}, step {self.step:,}"
