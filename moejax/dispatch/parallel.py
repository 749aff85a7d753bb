"""Expert parallelism: what `experts_batched` and `experts_grouped` compute, with E / R experts on
each of the R devices of the `expert` axis.

Inside `shard_map`. Tokens lie cut over BATCH_AXES, experts over `expert`, their hidden width over
`tensor`, and all of it over `fsdp`, gathered here for as long as it is used. Rows travel to their
experts and back: one all-to-all there, one back. What comes back is this device's part of the
hidden width; the sum over `tensor` is left for the end, where a token is one row again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.dispatch.exchange import ragged_all_to_all
from moejax.dispatch.experts import Experts, experts_batched, experts_grouped
from moejax.dispatch.shared import NOTHING, Beside, gathered, meanwhile

LINE = 128  # of a TPU's tiles, the width
INWARDS, OUTWARDS = P("expert", "fsdp", "tensor"), P("expert", "tensor", "fsdp")


def expert_specs(p: Experts) -> Experts:
    """How the experts' weights lie on the mesh.

    Raises:
      ValueError: experts that do not divide by the `expert` axis.
    """
    shards = jax.sharding.get_abstract_mesh().shape["expert"]
    if p.w_in_EDF.shape[0] % shards:
        raise ValueError(
            f"{p.w_in_EDF.shape[0]} experts are not divisible by mesh axis expert={shards}"
        )
    gate: Any = None if p.w_gate_EDF is None else INWARDS
    return Experts(INWARDS, OUTWARDS, gate)  # type: ignore[arg-type]


def spread_batched(
    p: Experts, x_ECD: jax.Array, activation: str, beside: Beside = NOTHING
) -> tuple[jax.Array, Any]:
    """This device's rows for each of all E experts, [E, C, D], to what the experts make of them;
    and what the work beside gives."""
    shards = jax.lax.axis_size("expert")
    num_experts, slots, dim = x_ECD.shape
    x_RECD = _swap(x_ECD.reshape(shards, num_experts // shards, slots, dim))
    x_RECD, work = meanwhile(x_RECD, beside.there())
    x_EMD = jnp.moveaxis(x_RECD, 0, 1).reshape(num_experts // shards, shards * slots, dim)
    y_EMD = experts_batched(whole(p), x_EMD, activation)
    y_EMD, work = meanwhile(y_EMD, work)
    y_RECD = jnp.moveaxis(y_EMD.reshape(num_experts // shards, shards, slots, dim), 1, 0)
    y_RECD, done = meanwhile(_swap(y_RECD), beside.back(work))
    return y_RECD.reshape(x_ECD.shape), done


def spread_grouped(
    p: Experts,
    x_NX: jax.Array,
    load_E: jax.Array,
    activation: str,
    beside: Beside = NOTHING,
    room: int | None = None,
) -> tuple[jax.Array, Any]:
    """This device's rows (see `in_lines`) sorted by expert, load_E[e] for expert e of all E, to
    what the experts make of them; the rows behind the last give 0. And what the work beside gives.

    Every expert's rows travel as a slice of their own, to where they lie sorted by expert again.

    A device has room for so many rows, and no more may come (see `fitted`); None = for those of all
    devices of its axis, whatever the load.
    """
    shards = jax.lax.axis_size("expert")
    here_RE, sent_RE = (a_E.reshape(shards, -1) for a_E in (_starts(load_E), load_E))
    came_RE = _swap(sent_RE)  # from each device, for each of my experts
    there_RE = _starts(came_RE.T.reshape(-1)).reshape(-1, shards).T
    out = (a_RE.reshape(-1) for a_RE in (here_RE, sent_RE, _swap(there_RE), came_RE))
    home = (a_RE.reshape(-1) for a_RE in (there_RE, came_RE, _swap(here_RE), sent_RE))
    num_rows, *line = x_NX.shape
    space_MX = jnp.zeros((room or shards * num_rows, *line), x_NX.dtype)
    x_MX = ragged_all_to_all(x_NX, space_MX, *out, axis_name="expert")
    x_MD, work = meanwhile(x_MX.reshape(len(x_MX), -1), beside.there())
    # Nobody sends or reads the rows behind the last: they are zeros, and may give anything.
    y_MD = experts_grouped(whole(p), x_MD, came_RE.sum(0), activation)
    y_MD, work = meanwhile(y_MD, work)
    y_MX = y_MD.reshape(-1, *line)
    y_NX = ragged_all_to_all(y_MX, jnp.zeros_like(x_NX), *home, axis_name="expert")
    return meanwhile(y_NX, beside.back(work))


def in_lines(x_TD: jax.Array) -> jax.Array:
    """[T, D / LINE, LINE]: rows that lie in one piece in a TPU's memory, as they must to travel.
    Picked in this shape none has to be laid out anew. Others stay [T, D]."""
    return x_TD.reshape(len(x_TD), -1, LINE) if x_TD.shape[1] % LINE == 0 else x_TD


def whole(p: Experts) -> Experts:
    """This device's experts, their weights gathered along `fsdp`."""
    return Experts(gathered(p.w_in_EDF, 1), gathered(p.w_out_EFD, 2), gathered(p.w_gate_EDF, 1))


def _swap(a_RX: jax.Array) -> jax.Array:
    """Row j goes to device j of the expert axis; row i of the result came from device i."""
    return jax.lax.all_to_all(a_RX, "expert", 0, 0)


def _starts(size_N: jax.Array) -> jax.Array:
    return jnp.cumsum(size_N) - size_N
