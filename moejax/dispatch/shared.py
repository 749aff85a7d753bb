"""The shared experts: a dense network on this device's own tokens, computed while the rows of the
others travel: its hidden rows on their way there, its outputs on their way back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.dispatch.experts import ACTIVATIONS


class Shared(NamedTuple):
    """Weights of the shared experts, all of them as one network of hidden width F."""

    w_in_DF: jax.Array
    w_out_FD: jax.Array
    w_gate_DF: jax.Array | None = None


class Beside(NamedTuple):
    """Work in two parts that needs no row from elsewhere; by default there is none.

    Attributes:
      there: the first part; `experts` starts when it is done.
      back: from what `there` gave, to what is added to this device's tokens, or None.
    """

    there: Callable[[], Any] = lambda: None
    back: Callable[[Any], Any] = lambda _: None

    def alone(self) -> Any:
        """Both parts, where nothing travels."""
        return self.back(self.there())


NOTHING = Beside()


def meanwhile(moved: Any, work: Any) -> Any:
    """(moved, work), neither of which can be read before both are there.

    Do not simplify: without this tie a compiler may leave nothing between the start of a transfer
    and its end, and then joins them again. The gradients of both are tied in the same way.
    """
    return (moved, None) if work is None else jax.lax.optimization_barrier((moved, work))


def first(x_TD: jax.Array, beside_TD: jax.Array | None) -> jax.Array:
    """What the experts' outputs are added to, float32: zeros, or what the work beside gave."""
    if beside_TD is None:
        return jnp.zeros(x_TD.shape, jnp.float32)
    return beside_TD.astype(jnp.float32)


def shared_beside(p: Shared | None, x_TD: jax.Array, activation: str, spread: bool) -> Beside:
    """The shared experts' work on these tokens. `spread`: inside `shard_map`, where each device of
    the axis `tensor` has a part of the hidden width, and the result is its part of the sum."""
    if p is None:
        return NOTHING
    whole = _whole(p) if spread else p
    function, _ = ACTIVATIONS[activation]

    @jax.named_scope("shared")
    def there() -> jax.Array:
        h_TF = x_TD @ whole.w_in_DF
        gate = whole.w_gate_DF
        return function(h_TF) if gate is None else function(x_TD @ gate) * h_TF

    @jax.named_scope("shared")
    def back(h_TF: jax.Array) -> jax.Array:
        return h_TF @ whole.w_out_FD

    return Beside(there, back)


def shared_specs(p: Shared | None) -> Any:
    """How their weights lie on the mesh."""
    if p is None:
        return None
    inwards = P("fsdp", "tensor")
    return Shared(inwards, P("tensor", "fsdp"), None if p.w_gate_DF is None else inwards)  # type: ignore[arg-type]


def _whole(p: Shared) -> Shared:
    return Shared(gathered(p.w_in_DF, 0), gathered(p.w_out_FD, 1), gathered(p.w_gate_DF, 0))


def gathered(w: jax.Array | None, axis: int) -> Any:
    """This device's weights, whole along an axis that is cut over `fsdp`. Backward: their
    gradients, scattered again."""
    if w is None or jax.lax.axis_size("fsdp") == 1:
        return w
    return jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True)
