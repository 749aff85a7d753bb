"""How big a model is: parameters, active parameters, and the FLOPs that a token costs."""

import math
from typing import NamedTuple

import jax
from flax import nnx

from moejax.config import Config
from moejax.model.transformer import Transformer


class Size(NamedTuple):
    """Analytic size of a model.

    Attributes:
      total: parameters.
      active: parameters that work on one token: everything but the experts it does not visit.
      flops: floating-point operations per token, forward and backward: 6 for each weight of a
        matmul that is computed, and the attention scores over the whole row. The embedding is a
        look-up. More than the active ones are computed where training asks every expert.
    """

    total: int
    active: int
    flops: float


def model_size(config: Config, vocab_size: int) -> Size:
    """The size of the config's model; nothing is computed or allocated."""
    model = nnx.eval_shape(lambda: Transformer(config, vocab_size, nnx.Rngs(params=0)))
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    sizes = [(str(getattr(path[-1], "key", "")), math.prod(leaf.shape)) for path, leaf in leaves]
    total = sum(size for _, size in sizes)
    routed = sum(size for name, size in sizes if name.endswith(("_EDF", "_EFD")))
    experts = max(1, config.moe.experts)
    active = total - round(routed * (1 - config.choices / experts))
    computed = total - round(routed * (1 - config.computed / experts))
    look_up = sum(size for name, size in sizes if name in ("embed_VD", "scale_D"))
    # Queries with keys, and with values; rope_dim is 0 but in latent attention.
    width = 2 * config.model.width + config.model.rope_dim
    attention = 2 * config.data.sequence * config.model.heads * width
    return Size(total, active, 6.0 * (computed - look_up) + 3.0 * config.model.layers * attention)
