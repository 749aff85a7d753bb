"""A transformer small enough to compile in a second, and its parameters as a plain tree."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.config import Config, default_config, router_config
from moejax.model import Transformer

VOCAB, ROWS, LENGTH = 32, 2, 8


def tiny_config(
    router: str = "topk", options: dict[str, Any] | None = None, **changes: Any
) -> Config:
    """Two layers with four experts; `changes` are dotted with __: moe__groups='sequence'."""
    config = default_config()
    config.router = router_config(router, **(options or {}))
    config.model.update(layers=2, dim=8, heads=2, ffn=12)
    config.moe.experts = 4
    config.data.update(batch=ROWS, sequence=LENGTH)
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return Config.from_dict(config)


def graph_of(config: Config) -> nnx.GraphDef:
    """What is static of the model."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, VOCAB, nnx.Rngs(0))))


@functools.cache
def _built(config: Config) -> tuple[nnx.GraphDef, Any]:
    # Not under one jit: XLA takes 25 s to compile all the random draws together.
    return nnx.split(Transformer(config, VOCAB, nnx.Rngs(0)))


def build(config: Config) -> tuple[nnx.GraphDef, Any]:
    """The model taken apart: what is static, and its parameters, the caller's own to change."""
    graph, params = _built(config)
    return graph, jax.tree.map(lambda a: a, params)


def tokens(seed: int = 0, shape: tuple[int, ...] = (ROWS, LENGTH)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, size=shape), jnp.int32)


def named(params: Any) -> dict[str, jax.Array]:
    """'stacks.0.blocks.1.attention.w_query_DHA' -> array."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params))
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Same trees, to `tolerance` of the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-2)
