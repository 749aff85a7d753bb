"""The experts themselves: a feed-forward network each, as batched or as grouped matmuls."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.dispatch.grouped import grouped_ffn, tokens_ffn

Activation = Callable[[jax.Array], jax.Array]
ACTIVATIONS: dict[str, tuple[Activation, bool]] = {
    # name: (function, gated). Gated: activation(x w_gate) * (x w_in), three matrices an expert.
    "swiglu": (jax.nn.silu, True),
    "geglu": (jax.nn.gelu, True),
    "gelu": (jax.nn.gelu, False),
    "relu": (jax.nn.relu, False),
}


class Experts(NamedTuple):
    """Weights of E experts.

    Attributes:
      w_in_EDF, w_out_EFD: input and output projections.
      w_gate_EDF: the gate's projection for gated activations, else None.
    """

    w_in_EDF: jax.Array
    w_out_EFD: jax.Array
    w_gate_EDF: jax.Array | None = None


# Smaller buffers are not worth the longer program.
LARGE_BUFFER = 512


def experts_batched(
    p: Experts, x_ECD: jax.Array, activation: str, used_E: jax.Array | None = None
) -> jax.Array:
    """Every expert on its own buffer of C rows: [E, C, D] to [E, C, D].

    used_E: int32, how many rows of each buffer are in use; those behind are zeros, and a CPU leaves
    them out. None = all.
    """
    function, gated = ACTIVATIONS[activation]
    if used_E is not None and x_ECD.shape[1] >= LARGE_BUFFER:
        return grouped_ffn(x_ECD, p.w_in_EDF, p.w_gate_EDF, p.w_out_EFD, used_E, function)
    h_ECF = jnp.einsum("ecd,edf->ecf", x_ECD, p.w_in_EDF)
    if gated:
        assert p.w_gate_EDF is not None
        h_ECF = function(jnp.einsum("ecd,edf->ecf", x_ECD, p.w_gate_EDF)) * h_ECF
    else:
        h_ECF = function(h_ECF)
    return jnp.einsum("ecf,efd->ecd", h_ECF, p.w_out_EFD)


def experts_grouped(p: Experts, x_ND: jax.Array, load_E: jax.Array, activation: str) -> jax.Array:
    """Rows sorted by expert, load_E[e] of them for expert e: [N, D] to [N, D]. The rest must be
    zeros, and may give anything."""
    function, _ = ACTIVATIONS[activation]
    weights = p.w_in_EDF, p.w_gate_EDF, p.w_out_EFD
    return grouped_ffn(x_ND, *weights, load_E, function, tail=False)


def experts_on_tokens(
    p: Experts,
    x_TD: jax.Array,
    token_N: jax.Array,
    weight_N: jax.Array,
    load_E: jax.Array,
    activation: str,
) -> tuple[jax.Array, jax.Array]:
    """The same of the tokens' rows x_TD[token_N]: y_TD, float32, the sum of a token's weighted
    outputs, and output_ED, the sum of an expert's, which has no gradient."""
    function, _ = ACTIVATIONS[activation]
    weights = p.w_in_EDF, p.w_gate_EDF, p.w_out_EFD
    return tokens_ffn(x_TD, token_N, weight_N, *weights, load_E, function)
