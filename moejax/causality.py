"""Who leaks: which routing lets a token's output depend on other tokens, found by trying.

A decoder is trained on its next token, so nothing of a token's output may come from later tokens of
its sequence; and what comes from other sequences of the batch is gone at inference. Attention keeps
to that, a router may not: one that compares tokens makes each depend on all it is compared with.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.dispatch import Experts
from moejax.moe import MoeOptions, MoeParams, moe
from moejax.routing import LayerSize

_DIM = 16
_TRIALS = 24


class Dependence(NamedTuple):
    """What the output of an MoE layer at one token depends on, besides that token.

    By perturbation: other tokens were changed and the output moved. By gradient: the output's
    derivative by other tokens is not 0; it does not see a choice that flips, so it may miss what
    perturbation finds.

    Attributes:
      later, later_gradient: later tokens of its own sequence.
      others, others_gradient: tokens of other sequences.
    """

    later: bool
    later_gradient: bool
    others: bool
    others_gradient: bool

    @property
    def causal(self) -> bool:
        return not (self.later or self.later_gradient)


@functools.lru_cache(maxsize=256)
def dependence(options: MoeOptions, num_experts: int, *, training: bool = True) -> Dependence:
    """Measures a layer's routing on random tokens, some of them crowding at one expert.

    Args:
      options: the router, the groups, the capacity. The dispatch makes no difference.
      num_experts: E.
      training: with a PRNG key, or as evaluation routes.
    """
    # A multiple of the experts, so that each can take as many tokens as the others.
    many = num_experts * math.ceil(16 / num_experts)
    rows, length = (many, 4) if options.groups == "position" else (2, many)
    options = options._replace(dispatch="gather", activation="relu")
    trials = functools.partial(_trials, options, num_experts, rows, length, training)
    found = jax.jit(trials)()
    return Dependence(*(bool(jnp.any(kind)) for kind in found))


def _trials(
    options: MoeOptions, num_experts: int, rows: int, length: int, training: bool
) -> tuple[jax.Array, ...]:
    """The four kinds of dependence in each trial, for the first row, or the last: one is served
    first when slots run out, the other last."""
    router, half = options.router, length // 2
    count_V = jnp.ones(256)
    state = router.init(LayerSize(num_experts, _DIM, 256, count_V))
    columns = router.columns(num_experts)

    def trial(key: jax.Array, crowd: jax.Array, row: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, 8)
        mine, early = jnp.arange(rows)[:, None] == row, jnp.arange(length)[None] < half
        later, others = mine & ~early, jnp.broadcast_to(~mine, (rows, length))

        def normal(i: int, *shape: int) -> jax.Array:
            return jax.random.normal(keys[i], shape)

        w_router_DE = normal(0, _DIM, num_experts).at[0, 0].add(crowd)
        extra = normal(1, _DIM, columns) / math.sqrt(_DIM) if columns else None
        ffn = normal(2, num_experts, _DIM, _DIM), normal(3, num_experts, _DIM, _DIM)
        params = MoeParams(w_router_DE / math.sqrt(_DIM), Experts(*ffn), extra)
        draw = keys[4] if training else None

        def tokens(i: int) -> tuple[jax.Array, jax.Array]:
            x_BSD = normal(i, rows, length, _DIM).at[..., 0].set(1.0)
            return x_BSD, jax.random.randint(keys[i], (rows, length), 0, 256)

        def output(tokens: tuple[jax.Array, jax.Array]) -> jax.Array:
            """Of the first half of the row."""
            x_BSD, token_BS = tokens
            y_BSD, _ = moe(
                params,
                x_BSD,
                options=options,
                valid_BS=jnp.ones((rows, length), bool),
                token_BS=token_BS,
                key=draw,
                state=state,
            )
            return y_BSD[row, :half]

        (x_BSD, token_BS), (other_BSD, other_BS) = tokens(5), tokens(6)
        # The tokens as they are; with the later ones changed; with the other rows changed.
        changed_XBS = jnp.stack([jnp.zeros_like(later), later, others])
        x_XBSD = jnp.where(changed_XBS[..., None], other_BSD[None], x_BSD[None])
        token_XBS = jnp.where(changed_XBS, other_BS[None], token_BS[None])
        y_XSD, pull = jax.vjp(lambda x: jax.lax.map(output, (x, token_XBS)), x_XBSD)
        (gradient_XBSD,) = pull(jnp.zeros_like(y_XSD).at[0].set(normal(7, half, _DIM)))
        gradient_BS = jnp.abs(gradient_XBSD[0]).max(-1)
        change_X = jnp.abs(y_XSD - y_XSD[:1]).max((1, 2)) > 1e-4 * jnp.abs(y_XSD[0]).max()
        small = 1e-6 * gradient_BS.max()
        return (
            change_X[1],
            jnp.where(later, gradient_BS, 0).max() > small,
            change_X[2],
            jnp.where(others, gradient_BS, 0).max() > small,
        )

    keys = jax.random.split(jax.random.key(0), _TRIALS)
    kind = jnp.arange(_TRIALS)
    crowds, row = jnp.asarray([0.0, 4.0, 8.0])[kind % 3], jnp.where(kind % 2 == 0, 0, rows - 1)
    return jax.lax.map(lambda args: trial(*args), (keys, crowds, row))
