"""Cross entropy of the next token, without ever holding all logits where there are many.

Where a vocabulary is large, sequences are cut into pieces whose logits are made, used and forgotten
one after the other, and made again for the gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from moejax.dispatch import BATCH_AXES, mesh_shards
from moejax.model.transformer import logits

FEW = 2**20  # logits of a sequence that are not worth cutting: 4 MiB
# Tokens of a piece on a device. With fewer a product takes as long as reading the unembedding does,
# which every piece does four times, and its gradient's sum twice.
ENOUGH = 512


def pieces(batch: int, sequence: int, dim: int, vocab: int) -> int:
    """How many pieces the sequences of a device are cut into: so many that the logits of one piece
    are at most twice as many numbers as the hidden states of the whole, or those of `ENOUGH`
    tokens. A divisor of the sequence's length."""
    if sequence * vocab <= FEW:
        return 1
    least = max(1, min(sequence, -(-vocab // (2 * dim)), batch * sequence // ENOUGH))
    return next(n for n in range(least, sequence + 1) if sequence % n == 0)


def cross_entropy(x_BSD: jax.Array, w_DV: jax.Array, target_BS: jax.Array) -> jax.Array:
    """nll_BS in nats, float32, of the logits x w; both in the compute dtype."""
    shards = mesh_shards()
    count = pieces(x_BSD.shape[0] // shards.count, x_BSD.shape[1], *w_DV.shape)
    if count == 1:
        logits_BSV = logits(x_BSD, w_DV)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BSV, target_BS)
    if not shards.axes:
        return _by_pieces(_whole, count, x_BSD, w_DV, target_BS)

    def local(x_BSD: jax.Array, w_DV: jax.Array, target_BS: jax.Array) -> jax.Array:
        # Gathered once, not once a piece; so is its gradient scattered.
        w_DV = jax.lax.all_gather(w_DV, "fsdp", axis=0, tiled=True)
        return _by_pieces(_spread, count, x_BSD, w_DV, target_BS)

    cut = P(BATCH_AXES)
    return jax.shard_map(
        local, in_specs=(cut, P("fsdp", "tensor"), cut), out_specs=cut, check_vma=False
    )(x_BSD, w_DV, target_BS)


def _by_pieces(
    nll: Callable[..., jax.Array],
    count: int,
    x_BSD: jax.Array,
    w_DV: jax.Array,
    target_BS: jax.Array,
) -> jax.Array:
    """nll(x, w, target) of each piece, one after the other."""

    def cut(a_BS: jax.Array) -> jax.Array:
        a_BPS = a_BS.reshape(a_BS.shape[0], count, -1, *a_BS.shape[2:])
        return jnp.swapaxes(a_BPS, 0, 1)

    @jax.checkpoint
    def piece(_: None, xs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, nll(xs[0], w_DV, xs[1])

    _, nll_PBS = jax.lax.scan(piece, None, (cut(x_BSD), cut(target_BS)))
    return jnp.swapaxes(nll_PBS, 0, 1).reshape(target_BS.shape)


def _whole(x_BSD: jax.Array, w_DV: jax.Array, target_BS: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(x_BSD, w_DV), target_BS)


def _spread(x_BSD: jax.Array, w_DV: jax.Array, target_BS: jax.Array) -> jax.Array:
    """Inside `shard_map`: each device of the axis `tensor` has a part of the vocabulary."""
    logits_BSV = logits(x_BSD, w_DV)
    top_BS = jax.lax.pmax(jax.lax.stop_gradient(logits_BSV.max(-1)), "tensor")
    own_BS = target_BS - jax.lax.axis_index("tensor") * w_DV.shape[1]
    here_BS = (own_BS >= 0) & (own_BS < w_DV.shape[1])
    index_BS1 = jnp.where(here_BS, own_BS, 0)[..., None]
    picked_BS = jnp.take_along_axis(logits_BSV, index_BS1, axis=-1)[..., 0]
    sums = jnp.exp(logits_BSV - top_BS[..., None]).sum(-1), jnp.where(here_BS, picked_BS, 0.0)
    sum_BS, picked_BS = jax.lax.psum(sums, "tensor")
    return jnp.log(sum_BS) + top_BS - picked_BS
