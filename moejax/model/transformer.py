"""A transformer whose feed-forward layers may have experts, scanned over its layers. A decoder, and
where tokens are masked an encoder: then attention sees later tokens too."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import Config
from moejax.model.attend import Mask, attention_mask
from moejax.model.cache import Cache, placed
from moejax.model.latent import LatentAttention
from moejax.model.layers import (
    Attention,
    FeedForward,
    Kept,
    RMSNorm,
    embedded,
    initial,
)
from moejax.model.moe import MoE
from moejax.model.remat import rematerialised
from moejax.model.soft import SoftMoE
from moejax.routing import MoeStats, Recorded, token_keys
from moejax.sharding import constrain


class Context(NamedTuple):
    """What every layer sees besides its input. With a cache of M slots `start` is that of the first
    token; without one M = S."""

    token_BS: jax.Array
    position_BS: jax.Array
    valid_BS: jax.Array
    mask: Mask
    start: jax.Array | int = 0
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
        cache: Kept | None = None,
    ) -> tuple[jax.Array, MoeStats | None, Kept | None]:
        normed_BSD, position_BS = self.attention_norm(x_BSD), context.position_BS
        kept = self.attention.keep(normed_BSD, position_BS)
        seen = kept if cache is None else placed(cache, kept, context.start, axis=1)
        x_BSD = x_BSD + self.attention(normed_BSD, seen, context.mask, position_BS)
        normed_BSD = self.feed_forward_norm(x_BSD)
        returned = None if cache is None else kept
        if isinstance(self.feed_forward, FeedForward):
            return x_BSD + self.feed_forward(normed_BSD), None, returned
        y_BSD, stats = self.feed_forward(
            normed_BSD,
            valid_BS=context.valid_BS,
            token_BS=context.token_BS,
            key=key,
            state=state,
            recorded=recorded,
            record=context.record,
        )
        return x_BSD + y_BSD, stats, returned


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
        cache: tuple[Kept, ...] | None = None,
    ) -> tuple[jax.Array, MoeStats | None, tuple[Kept | None, ...]]:
        stats, kept = None, []
        for i, block in enumerate(self.blocks):
            mine = None if cache is None else cache[i]
            x_BSD, block_stats, block_kept = block(x_BSD, context, key, state, recorded, mine)
            stats = stats if block_stats is None else block_stats
            kept.append(block_kept)
        return x_BSD, stats, tuple(kept)


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
          key: in training a PRNG key, or one for each sequence [B]; None in evaluation.
          router_state: the routers' states with a leading axis over MoE layers, or None.
          recorded: another run's routing of these tokens, arrays [L, B, S, R] over MoE layers, for
            the router `replay`.
          record: put this routing into the statistics: `decisions`, arrays [L, B, S, ...].
          head: what is returned in the place of `logits`, of the same arguments.

        Returns:
          logits_BSV float32, and `MoeStats` with a leading axis over MoE layers; None if there are
          none.
        """
        context = self._context(token_BS, segment_BS, position_BS, valid_BS)._replace(record=record)
        keys_LB = None if key is None else self._layer_keys(token_keys(key, token_BS.shape[0]))
        x_BSD, stats, _ = self._layers(context, (keys_LB, router_state, recorded))
        return self._head(x_BSD, head), stats

    def extend(
        self,
        cache: Cache,
        token_BS: jax.Array,
        *,
        segment_BS: jax.Array,
        position_BS: jax.Array,
        valid_BS: jax.Array,
        router_state: Any = None,
        head: Head | None = None,
    ) -> tuple[jax.Array, Cache]:
        """The logits of tokens that follow those of a cache, as evaluation routes, and the cache
        that holds them too; the arguments are those of the call. Where no token's routing looks at
        others, the logits are those of a call with all tokens together."""
        start = cache.used
        segment_BM = placed(cache.segment_BM, segment_BS, start, axis=1)
        mask = attention_mask(segment_BS, segment_BM, start)
        context = Context(token_BS, position_BS, valid_BS, mask, start)
        x_BSD, _, kept = self._layers(context, (None, router_state, None), cache.kept)
        kept = placed(cache.kept, kept, start, axis=2)
        return self._head(x_BSD, head), Cache(kept, segment_BM, start + token_BS.shape[1])

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """For so many rows of text, each of so many tokens."""
        x_BSD = jnp.zeros((rows, slots, self.config.model.dim), self.config.model.dtype)
        place_BS = jnp.zeros((rows, slots), jnp.int32)

        def kept(unit: Unit) -> tuple[Kept, ...]:
            return tuple(block.attention.keep(x_BSD, place_BS) for block in unit.blocks)

        def slots_of(unit: Unit) -> Any:
            graph, params_L = nnx.split(unit)
            shapes = jax.eval_shape(jax.vmap(lambda p: kept(nnx.merge(graph, p))), params_L)
            return jax.tree.map(
                lambda a: constrain(jnp.zeros(a.shape, a.dtype), "kept_LBMGA"), shapes
            )

        return Cache([slots_of(unit) for unit in self.stacks], place_BS, jnp.zeros((), jnp.int32))

    def _layers(
        self, context: Context, of_moe: tuple[Any, Any, Any], cache: Any = None
    ) -> tuple[jax.Array, MoeStats | None, list[Any]]:
        """What the last layer makes of the tokens. `of_moe`: the keys, router states and recordings
        of the MoE layers."""
        x_BSD = embedded(self.embed_VD[...], context.token_BS, jnp.dtype(self.config.model.dtype))
        x_BSD = constrain(x_BSD, "x_BSD")
        stats, kept = None, []
        for i, (kinds, _) in enumerate(layer_stacks(self.config)):
            routed = "moe" in kinds
            per_layer = of_moe if routed else (None, None, None)
            mine = None if cache is None else cache[i]
            x_BSD, (unit_stats, unit_kept) = self._scan(
                self.stacks[i], x_BSD, context, (*per_layer, mine)
            )
            stats = unit_stats if routed else stats
            kept.append(unit_kept)
        return x_BSD, stats, kept

    def _head(self, x_BSD: jax.Array, head: Head | None) -> jax.Array:
        w_DV = self.unembed_DV[...].astype(self.config.model.dtype)
        return (head or logits)(self.final_norm(x_BSD), w_DV)

    def _layer_keys(self, key_B: jax.Array) -> jax.Array:
        layers = max(1, self.config.moe_layers)
        return jnp.swapaxes(jax.vmap(lambda key: jax.random.split(key, layers))(key_B), 0, 1)

    def _scan(
        self, unit: Unit, x_BSD: jax.Array, context: Context, per_layer: tuple[Any, ...]
    ) -> tuple[jax.Array, Any]:
        graph, params_L = nnx.split(unit)

        def layer(x_BSD: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            params, mine = xs
            x_BSD, stats, kept = nnx.merge(graph, params)(x_BSD, context, *mine)
            return constrain(x_BSD, "x_BSD"), (stats, kept)

        layer = rematerialised(layer, self.config.model.remat)
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
        mask = attention_mask(segment_BS, causal=self.config.causal)
        return Context(token_BS, position_BS, valid_BS, mask)
