"""Hash routing: a table from token id to expert. Nothing is learned, so it is what learning must
beat."""

import jax
import jax.numpy as jnp

from moejax.routing.spec import LayerSize, RouterSpec
from moejax.routing.types import RouterInput, Routing, token_choice

KINDS = ("random", "balanced")
LOOKS = ("token", "next")


def hash_router(r: RouterInput, *, k: int = 1, look: str = "token") -> Routing:
    """Hash layers (Roller et al. 2021, 2106.04426): expert = table[id], weight 1, no router.

    The router's matrix exists, as everywhere, and is not used. look='next' reads the *following*
    id: a control that leaks the future, for leak detectors to catch and never for results.

    Args:
      r: the router's input with token ids; its state is the table, int32 [V].
      k: 1; any other value is refused.
      look: 'token', or 'next'.

    Raises:
      ValueError: k other than 1, unknown `look`, no token ids, or no table.
    """
    if k != 1:
        raise ValueError(f"hash routes each token to 1 expert, got k={k}")
    if look not in LOOKS:
        raise ValueError(f"unknown look={look!r}: use 'token' or 'next'")
    id_T = r.token_T if look == "token" else r.next_T
    if id_T is None or r.state is None:
        raise ValueError("hash needs token ids (token_BS) and its table (state, see init_state)")
    num_experts = r.logits_TE.shape[-1]
    expert_T = r.state[id_T]
    scores_TE = jax.nn.one_hot(expert_T, num_experts, dtype=jnp.float32)
    return token_choice(r, expert_T[:, None], jnp.ones((len(id_T), 1)), scores_TE)


def make_table(size: LayerSize, *, table: str = "random", table_seed: int = 0) -> jax.Array:
    """The table, int32 [V]; every layer has the same one, and no step changes it.

    'random': an expert drawn for each id. 'balanced': ids by falling frequency in the training
    text, each to the expert that has least so far.

    Raises:
      ValueError: unknown table, or a vocabulary of unknown size.
    """
    if table not in KINDS:
        raise ValueError(f"unknown table={table!r}: use 'random' or 'balanced'")
    if size.vocab_size < 1:
        raise ValueError(f"hash needs the vocabulary's size, got vocab_size={size.vocab_size}")
    if table == "random":
        key = jax.random.key(table_seed)
        return jax.random.randint(key, (size.vocab_size,), 0, size.experts, jnp.int32)
    count_V = jnp.ones(size.vocab_size) if size.count_V is None else size.count_V
    return balanced_table(count_V, size.experts)


def balanced_table(count_V: jax.Array, experts: int) -> jax.Array:
    """The most frequent id first, each to the lightest expert; equals go to the lowest index."""

    def place(mass_E: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        expert = jnp.argmin(mass_E).astype(jnp.int32)
        return mass_E.at[expert].add(count), expert

    count_V = count_V.astype(jnp.float32)
    sorted_V = jnp.argsort(-count_V, stable=True)
    _, expert_V = jax.lax.scan(place, jnp.zeros(experts), count_V[sorted_V])
    return jnp.zeros_like(expert_V).at[sorted_V].set(expert_V, unique_indices=True)


ROUTERS = {
    "hash": RouterSpec(
        hash_router,
        "token",
        "1",
        "by the table (state), which never changes",
        "Roller et al. 2021, 2106.04426",
        "balanced tables by hand; the leak of look='next' is found",
        init=make_table,
    ),
}
