"""`RouterSpec`: all there is to say of a router, and what its state may be sized by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from moejax.routing.types import Routing


class LayerSize(NamedTuple):
    """What a router's state may depend on.

    Attributes:
      experts, dim: E and D.
      vocab_size: V, 0 where it is not known.
      count_V: how often each id stands in the training text, float32; None where it is not known.
    """

    experts: int
    dim: int = 0
    vocab_size: int = 0
    count_V: jax.Array | None = None


class RouterSpec(NamedTuple):
    """A catalogue entry: the pure function, what it needs, and what a reader asks first.

    A user's own spec stands wherever a router's name does: it gives a function a state, further
    projections, or the word that its tokens choose alone.

    Attributes:
      route: (RouterInput, *, hyper-parameters) -> Routing.
      chooses: 'token', 'expert' or 'batch' (an assignment of all tokens): who picks whom. Where a
        token's experts depend on no other token, 'token' lets each device of a mesh ask about its
        own tokens only; a function without a spec is asked about the whole batch.
      weight: the score, and whether it is raw or renormalised.
      balance: the loss or the state that keeps the load even.
      paper: where it is from.
      checked: what its numbers were checked against.
      init: (LayerSize, *, hyper-parameters) -> the state of one layer at step 0; None = no state.
      update: (state, MoeStats, *, hyper-parameters) -> state, once per optimizer step. All arrays
        have a leading axis over MoE layers. None = the state stays as it is.
      columns: (E, *, hyper-parameters) -> X, how many further projections of a token the router
        looks at (`RouterInput.extra_TX`); None = none.
      every_expert: training computes all E experts for each token, or does at first.
      weights: (key, shape) -> initial weights of the router's projections; None = the model's own
        initialisation.
    """

    route: Callable[..., Routing]
    chooses: str
    weight: str = ""
    balance: str = ""
    paper: str = ""
    checked: str = ""
    init: Callable[..., Any] | None = None
    update: Callable[..., Any] | None = None
    columns: Callable[..., int] | None = None
    every_expert: bool = False
    weights: Callable[[jax.Array, tuple[int, ...]], jax.Array] | None = None
