"""`moejax.MoE`: the layer as an NNX module, for our own transformer and for anybody's."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import ModelConfig, MoeConfig, RouterConfig
from moejax.dispatch import ACTIVATIONS, Experts
from moejax.model.layers import FeedForward, initial
from moejax.moe import MoeOptions, MoeParams, moe
from moejax.routing import LayerSize, MoeStats, Recorded


class MoE(nnx.Module):
    """A Mixture-of-Experts feed-forward layer.

    A drop-in for a dense FFN of someone else's model:

        layer = moejax.MoE(ModelConfig(dim=512), MoeConfig(experts=8), "topk", rngs=nnx.Rngs(0))
        y_BSD, stats = layer(x_BSD)

    The forward pass writes nothing: the router's state goes in as `state`, the loads come out in
    `stats`; add `balance_losses(stats, ...)` to the loss, and call `layer.router.update(state,
    stats)` once per optimizer step where the router has a state (`layer.init_state()`).

    Args:
      model: dim, ffn, activation, init_scale and dtype are used.
      config: experts, dispatch, capacity.
      router: a name of ROUTERS, a function RouterInput -> Routing, or a RouterConfig.
      rngs: of the initial weights.
    """

    def __init__(
        self, model: ModelConfig, config: MoeConfig, router: Any = "topk", *, rngs: nnx.Rngs
    ) -> None:
        if config.slots:
            raise ValueError(f"MoE routes, moe.slots={config.slots} is for SoftMoE; set it to 0")
        router = router if isinstance(router, RouterConfig) else RouterConfig(router)
        self.router = router.make()
        self.size = LayerSize(config.experts, model.dim)
        self.dtype = jnp.dtype(model.dtype)
        self.options = MoeOptions(
            router=self.router,
            dispatch=config.dispatch,
            activation=model.activation,
            capacity_factor=config.capacity_factor,
            groups=config.groups,
            jitter=config.jitter,
            buffer_factor=config.buffer_factor,
        )
        e, d, f, scale = config.experts, model.dim, config.ffn or model.ffn, model.init_scale
        self.w_router_DE = self._projection(rngs, (d, e), scale * config.router_scale)
        columns = self.router.columns(e)
        self.w_extra_DX = (
            self._projection(rngs, (d, columns), scale * config.router_scale) if columns else None
        )
        self.w_in_EDF = initial(rngs, (e, d, f), (1,), scale)
        self.w_out_EFD = initial(rngs, (e, f, d), (1,), scale)
        gated = ACTIVATIONS[model.activation][1]
        self.w_gate_EDF = initial(rngs, (e, d, f), (1,), scale) if gated else None
        self.shared = FeedForward(model, config.shared * f, rngs) if config.shared else None

    def _projection(self, rngs: nnx.Rngs, shape: tuple[int, int], scale: float) -> nnx.Param:
        """A router's weights: as its paper wants them, else as all others."""
        if self.router.spec is None or self.router.spec.weights is None:
            return initial(rngs, shape, (0,), scale)
        return nnx.Param(self.router.spec.weights(rngs.params(), shape))

    def init_state(self, vocab_size: int = 0, count_V: jax.Array | None = None) -> Any:
        """The router's state before the first step; None for most routers.

        Hashing needs to know how many ids there are, and how often each stands in the text.
        """
        return self.router.init(self.size._replace(vocab_size=vocab_size, count_V=count_V))

    def __call__(
        self,
        x_BSD: jax.Array,
        *,
        valid_BS: jax.Array | None = None,
        token_BS: jax.Array | None = None,
        key: jax.Array | None = None,
        state: Any = None,
        recorded: Recorded | None = None,
        record: bool = False,
    ) -> tuple[jax.Array, MoeStats]:
        """y_BSD in x's dtype and this layer's `MoeStats`; the arguments are those of
        `moejax.moe.moe`."""
        valid_BS = jnp.ones(x_BSD.shape[:2], bool) if valid_BS is None else valid_BS
        experts = Experts(self.w_in_EDF[...], self.w_out_EFD[...], None)
        if self.w_gate_EDF is not None:
            experts = experts._replace(w_gate_EDF=self.w_gate_EDF[...])
        shared = None if self.shared is None else self.shared.weights()
        experts, shared = jax.tree.map(lambda w: w.astype(self.dtype), (experts, shared))
        y_BSD, stats = moe(
            MoeParams(
                self.w_router_DE[...],
                experts,
                None if self.w_extra_DX is None else self.w_extra_DX[...],
                shared,
            ),
            x_BSD.astype(self.dtype),
            options=self.options,
            valid_BS=valid_BS,
            token_BS=token_BS,
            key=key,
            state=state,
            recorded=recorded,
            record=record,
        )
        return y_BSD.astype(x_BSD.dtype), stats
