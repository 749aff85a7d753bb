"""The two contracts of a router: what it is given, and what it returns.

A routing is a sparse tokens x experts matrix in coordinate form, so that token choice, expert
choice, hashing and assignment are one type, and one dispatcher, one set of metrics and one viewer
serve them all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class RouterInput(NamedTuple):
    """Everything a router may look at. A router ignores the fields it has no use for.

    Attributes:
      logits_TE: float32, the router's matmul over the token's vector.
      valid_T: bool, True = a real token. Others get no expert, no capacity, no loss, no load.
      key: in training PRNG keys [T], so that a token's noise is the same however the batch is cut
        and wherever it lies; or one key for all, split among them. None in evaluation: no noise.
        Draw with `token_noise`.
      state: what the router carries between steps (`loss_free`: bias_E), None for most.
      token_T: int32 vocabulary ids, for routers that hash them.
      next_T: int32, the id that follows in the sequence (the last one's own id), for controls that
        cheat.
      extra_TX: float32, X further projections of the token, for routers that ask for them
        (`RouterSpec.columns`); None for most.
      recorded: another run's decisions for these tokens, for `replay`; None for most.
    """

    logits_TE: jax.Array
    valid_T: jax.Array
    key: jax.Array | None = None
    state: Any = None
    token_T: jax.Array | None = None
    next_T: jax.Array | None = None
    extra_TX: jax.Array | None = None
    recorded: "Recorded | None" = None


class Recorded(NamedTuple):
    """A routing as kept per token, R of them at most.

    Attributes:
      expert_TR: int32, best first; num_experts = none.
      weight_TR: float32, 0 where none.
    """

    expert_TR: jax.Array
    weight_TR: jax.Array


class Routing(NamedTuple):
    """Assignments of tokens to experts. Their order is their priority when an expert is full.

    A pair (token, expert) stands in it at most once.

    Attributes:
      token_N: int32, the row: which token ...
      expert_N: int32, ... goes to which expert; num_experts means nowhere.
      weight_N: float32, how much the expert's output counts; carries the router's gradient.
      choice_N: int32, which of its token's choices this is (0 = first), for metrics only. -1: no
        choice, computed for the router's gradient alone (DenseMixer); it counts nowhere.
      scores_TE: float32 affinities, without noise or bias, for losses and metrics.
      sums: name -> array, the router's own sums over valid tokens, for its losses and for its
        state's update. They are added up over groups, microbatches and devices; those that are one
        number are logged per valid token, as own.NAME.
      rest_TD: float32, what a token gets besides its experts' outputs (Default MoE); None for most.
    """

    token_N: jax.Array
    expert_N: jax.Array
    weight_N: jax.Array
    choice_N: jax.Array
    scores_TE: jax.Array
    sums: dict[str, jax.Array] = {}
    rest_TD: jax.Array | None = None


RouterFn = Callable[[RouterInput], Routing]


def token_keys(key: jax.Array, num_tokens: int) -> jax.Array:
    """PRNG keys [T]: as they are, or split from one."""
    return key if key.ndim else jax.random.split(key, num_tokens)


def token_noise(r: RouterInput, draw: Callable[[jax.Array], Any]) -> Any:
    """What `draw` makes of each token's own key, stacked: arrays [T, ...].

    As in token_noise(r, lambda key: jax.random.normal(key, (num_experts,))). `r.key` is not None.
    """
    assert r.key is not None
    return jax.vmap(draw)(token_keys(r.key, r.logits_TE.shape[0]))


def token_choice(
    r: RouterInput,
    expert_TK: jax.Array,
    weight_TK: jax.Array,
    scores_TE: jax.Array,
    order: str = "k_major",
) -> Routing:
    """Every token lists K experts, best first.

    Args:
      r: the router's input; its invalid tokens go nowhere.
      expert_TK: int32; an entry equal to E goes nowhere.
      weight_TK: float32.
      scores_TE: float32.
      order: who goes first when an expert is full. 'k_major': all first choices, then all second
        ones (GShard); 'token_major': all choices of token 0, then of token 1; 'bpr': k_major with
        the tokens sorted by their largest weight (batch-prioritised routing, Riquelme et al. 2021,
        2106.05974).

    Raises:
      ValueError: unknown order.
    """
    num_tokens, k = expert_TK.shape
    num_experts = scores_TE.shape[-1]
    expert_TK = jnp.where(r.valid_T[:, None], expert_TK, num_experts)
    weight_TK = jnp.where(expert_TK < num_experts, weight_TK, 0.0)
    token_TK, choice_TK = jnp.indices((num_tokens, k), jnp.int32)
    columns = (token_TK, expert_TK.astype(jnp.int32), weight_TK, choice_TK)
    if order == "k_major":
        flat = [a.T.reshape(-1) for a in columns]
    elif order == "token_major":
        flat = [a.reshape(-1) for a in columns]
    elif order == "bpr":
        sorted_T = jnp.argsort(-weight_TK.max(-1), stable=True)
        flat = [a[sorted_T].T.reshape(-1) for a in columns]
    else:
        raise ValueError(f"unknown order {order!r}: use 'k_major', 'token_major' or 'bpr'")
    return Routing(flat[0], flat[1], flat[2], flat[3], scores_TE)


def combine_TE(routing: Routing) -> jax.Array:
    """The routing as the dense float32 [T, E] matrix of weights, for tests and notebooks."""
    return (
        jnp.zeros_like(routing.scores_TE)
        .at[routing.token_N, routing.expert_N]
        .add(routing.weight_N, mode="drop")
    )
