"""Attention on NVIDIA's GPUs by cuDNN's kernel, as JAX ships it: it holds no scores in memory."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
from jax import lax

Core = Callable[..., jax.Array]  # (q_BSHC, k_BMGC, v_BMGA, seen_BSM) -> y_BSHA


def takes(*arrays: jax.Array) -> bool:
    """Whether these q_BSHC, k_BMGC, v_BMGA and seen_BSM may be the kernel's here: 16-bit numbers of
    widths and lengths that JAX knows it to take, on one GPU. (With several it was not tried.)"""
    if jax.default_backend() != "gpu" or jax.sharding.get_abstract_mesh().size > 1:
        return False
    return _taken(tuple((a.shape, a.dtype) for a in arrays))


@cache
def _taken(like: tuple[tuple[tuple[int, ...], Any], ...]) -> bool:
    *arrays, seen_BSM = (jax.ShapeDtypeStruct(*a) for a in like)
    try:
        jax.eval_shape(_gradients(partial(_kernel, False)), arrays[0], *arrays, seen_BSM)
    except (NotImplementedError, RuntimeError, ValueError):  # so JAX says it of them, or of cuDNN
        return False
    return True


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fused(in_order: bool, otherwise: Core, *arrays: jax.Array) -> jax.Array:
    """y_BSHA of q_BSHC, k_BMGC, v_BMGA and seen_BSM: by the kernel in a program for NVIDIA's GPUs,
    else `otherwise`.

    in_order: no token sees a later one; their scores the kernel leaves out. The gradient computes
    the values again: chosen around the two rules, each path would keep the other's residuals.
    """
    return lax.platform_dependent(*arrays, cuda=partial(_kernel, in_order), default=otherwise)


def _forward(in_order: bool, otherwise: Core, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    return fused(in_order, otherwise, *arrays), arrays


def _backward(in_order: bool, otherwise: Core, arrays: Any, dy_BSHA: jax.Array) -> tuple[Any, ...]:
    kernel, other = _gradients(partial(_kernel, in_order)), _gradients(otherwise)
    return *lax.platform_dependent(dy_BSHA, *arrays, cuda=kernel, default=other), None


fused.defvjp(_forward, _backward)


def _gradients(core: Core) -> Callable[..., tuple[jax.Array, ...]]:
    def of(dy_BSHA: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        *qkv, seen_BSM = arrays
        return jax.vjp(lambda *qkv: core(*qkv, seen_BSM), *qkv)[1](dy_BSHA)

    return of


def _kernel(
    in_order: bool, q_BSHC: jax.Array, k_BMGC: jax.Array, v_BMGC: jax.Array, seen_BSM: jax.Array
) -> jax.Array:
    return jax.nn.dot_product_attention(
        *(q_BSHC, k_BMGC, v_BMGC),
        mask=seen_BSM[:, None],
        is_causal=in_order,
        implementation="cudnn",
    )
