"""A transformer whose feed-forward layers may have experts, scanned over its layers. A decoder, and
where tokens are masked an encoder: then attention sees later tokens too."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import Config
from moejax.model.latent import LatentAttention
from moejax.model.layers import Attention, FeedForward, RMSNorm, attention_mask, initial
from moejax.model.moe import MoE
from moejax.model.soft import SoftMoE
from moejax.routing import MoeStats, Recorded
from moejax.sharding import constrain


class Context(NamedTuple):
    """What every layer sees besides its input."""

    token_BS: jax.Array
    position_BS: jax.Array
    valid_BS: jax.Array
    mask_BSS: jax.Array
    record: bool = False


class Block(nnx.Module):
    """x + attention(norm x), then x + feed_forward(norm x); the feed-forward may be an MoE."""

    def __init__(self, config: Config, kind: str, key: jax.Array) -> None:
        model = config.model
        # Two keys, so that arms of a comparison start from the same attention weights whatever
        # their feed-forward layers are.
        attention_key, feed_forward_key = jax.random.split(key)
        self.attention_norm = RMSNorm(model.dim)
        attention = LatentAttention if model.attention == "latent" else Attention
        self.attention = attention(model, nnx.Rngs(params=attention_key))
        self.feed_forward_norm = RMSNorm(model.dim)
        rngs = nnx.Rngs(params=feed_forward_key)
        self.feed_forward: FeedForward | MoE | SoftMoE
        if kind == "moe" and config.moe.slots:
            self.feed_forward = SoftMoE(model, config.moe, rngs=rngs)
        elif kind == "moe":
            self.feed_forward = MoE(model, config.moe, config.router, rngs=rngs)
        else:
            self.feed_forward = FeedForward(model, model.ffn, rngs)

    def __call__(
        self,
        x_BSD: jax.Array,
        context: Context,
        key: jax.Array | None,
        state: Any,
        recorded: Recorded | None = None,
    ) -> tuple[jax.Array, MoeStats | None]:
        normed_BSD = self.attention_norm(x_BSD)
        x_BSD = x_BSD + self.attention(normed_BSD, context.mask_BSS, context.position_BS)
        normed_BSD = self.feed_forward_norm(x_BSD)
        if isinstance(self.feed_forward, FeedForward):
            return x_BSD + self.feed_forward(normed_BSD), None
        y_BSD, stats = self.feed_forward(
            normed_BSD,
            valid_BS=context.valid_BS,
            token_BS=context.token_BS,
            key=key,
            state=state,
            recorded=recorded,
            record=context.record,
        )
        return x_BSD + y_BSD, stats


class Unit(nnx.Module):
    """The repeated unit: some dense blocks, then at most one with experts."""

    def __init__(self, config: Config, kinds: tuple[str, ...], keys: jax.Array) -> None:
        self.blocks = nnx.List(
            [Block(config, kind, keys[i]) for i, kind in enumerate(kinds)],
        )

    def __call__(
        self,
        x_BSD: jax.Array,
        context: Context,
        key: jax.Array | None,
        state: Any,
        recorded: Recorded | None = None,
    ) -> tuple[jax.Array, MoeStats | None]:
        stats = None
        for block in self.blocks:
            x_BSD, block_stats = block(x_BSD, context, key, state, recorded)
            stats = stats if block_stats is None else block_stats
        return x_BSD, stats


def layer_stacks(config: Config) -> list[tuple[tuple[str, ...], int]]:
    """The layers from bottom to top, as (kinds of block in a unit, how often the unit repeats)."""
    if not config.moe.experts:
        return [(("dense",), config.model.layers)]
    unit = ("dense",) * (config.moe.every - 1) + ("moe",)
    stacks = [(("dense",), config.moe.first_dense)] if config.moe.first_dense else []
    return [*stacks, (unit, config.moe_layers)]


def stacked_units(config: Config, kinds: tuple[str, ...], keys_LU: jax.Array) -> Unit:
    """A Unit whose parameters have a leading layer axis, one slice for each row of keys."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Unit(config, kinds, keys_LU[0])))
    return nnx.merge(graph, jax.vmap(lambda keys: nnx.state(Unit(config, kinds, keys)))(keys_LU))


Head = Callable[[jax.Array, jax.Array], jax.Array]


def logits(x_BSD: jax.Array, w_DV: jax.Array) -> jax.Array:
    """logits_BSV in float32, of hidden states and the unembedding in the compute dtype."""
    return jnp.einsum("bsd,dv->bsv", x_BSD, w_DV, preferred_element_type=jnp.float32)


class Transformer(nnx.Module):
    """The model as an object: `logits_BSV, stats = Transformer(config, vocab_size,
    rngs)(tokens_BS)`.

    Args:
      config: the run's config; model, moe and router are used.
      vocab_size: V.
      rngs: one draw from `params` seeds all weights.
    """

    def __init__(self, config: Config, vocab_size: int, rngs: nnx.Rngs) -> None:
        self.config = config
        model = config.model
        embed_key, unembed_key, layers_key = jax.random.split(rngs.params(), 3)
        keys_L = jax.random.split(layers_key, model.layers)
        # fan-in D, not V: an embedding is read, not summed over.
        self.embed_VD = initial(
            nnx.Rngs(params=embed_key), (vocab_size, model.dim), (1,), model.init_scale
        )
        stacks, first = [], 0
        for kinds, repeats in layer_stacks(config):
            keys = keys_L[first : first + len(kinds) * repeats].reshape(repeats, len(kinds))
            stacks.append(stacked_units(config, kinds, keys))
            first += len(kinds) * repeats
        self.stacks = nnx.List(stacks)
        self.final_norm = RMSNorm(model.dim)
        self.unembed_DV = initial(
            nnx.Rngs(params=unembed_key), (model.dim, vocab_size), (0,), model.init_scale
        )

    def __call__(
        self,
        token_BS: jax.Array,
        *,
        segment_BS: jax.Array | None = None,
        position_BS: jax.Array | None = None,
        valid_BS: jax.Array | None = None,
        key: jax.Array | None = None,
        router_state: Any = None,
        recorded: Recorded | None = None,
        record: bool = False,
        head: Head | None = None,
    ) -> tuple[jax.Array, MoeStats | None]:
        """Logits of the next token; of the masked ones, if the config masks tokens.

        Args:
          token_BS: int32 ids.
          segment_BS: int32 document number of each token; None = one document a row.
          position_BS: int32 position in the document; None = position in the row.
          valid_BS: bool, True = a real token; None = all are.
          key: PRNG key in training, None in evaluation.
          router_state: the routers' states with a leading axis over MoE layers, or None.
          recorded: another run's routing of these tokens, arrays [L, B, S, R] over MoE layers, for
            the router `replay`.
          record: put this routing into the statistics, in the same form.
          head: what is returned in the place of `logits`, of the same arguments.

        Returns:
          logits_BSV float32, and `MoeStats` with a leading axis over MoE layers; None if there are
          none.
        """
        context = self._context(token_BS, segment_BS, position_BS, valid_BS)._replace(record=record)
        dtype = jnp.dtype(self.config.model.dtype)
        # The table whole along D: else what is looked up lies cut along D, and is moved whole.
        embed_VD = constrain(self.embed_VD[...].astype(dtype), "embed_read_VD")
        x_BSD = constrain(embed_VD[token_BS], "x_BSD")
        keys_L = None if key is None else jax.random.split(key, max(1, self.config.moe_layers))
        stats = None
        for unit, (kinds, _) in zip(self.stacks, layer_stacks(self.config), strict=True):
            routed = "moe" in kinds
            per_layer = (keys_L, router_state, recorded) if routed else (None, None, None)
            x_BSD, unit_stats = self._scan(unit, x_BSD, context, per_layer)
            stats = unit_stats if routed else stats
        w_DV = self.unembed_DV[...].astype(dtype)
        return (head or logits)(self.final_norm(x_BSD), w_DV), stats

    def _scan(
        self, unit: Unit, x_BSD: jax.Array, context: Context, per_layer: tuple[Any, Any, Any]
    ) -> tuple[jax.Array, Any]:
        graph, params_L = nnx.split(unit)

        def layer(x_BSD: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            params, (key, state, recorded) = xs
            x_BSD, stats = nnx.merge(graph, params)(x_BSD, context, key, state, recorded)
            return constrain(x_BSD, "x_BSD"), stats

        if self.config.model.remat:
            layer = jax.checkpoint(layer)
        return jax.lax.scan(layer, x_BSD, (params_L, per_layer))

    def _context(
        self,
        token_BS: jax.Array,
        segment_BS: jax.Array | None,
        position_BS: jax.Array | None,
        valid_BS: jax.Array | None,
    ) -> Context:
        if segment_BS is None:
            segment_BS = jnp.zeros_like(token_BS)
        if position_BS is None:
            position_BS = jnp.broadcast_to(jnp.arange(token_BS.shape[1])[None], token_BS.shape)
        if valid_BS is None:
            valid_BS = jnp.ones(token_BS.shape, bool)
        mask_BSS = attention_mask(segment_BS, causal=self.config.causal)
        return Context(token_BS, position_BS, valid_BS, mask_BSS)
