"""What text costs a saved run whose tokens do without one of their experts."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.analysis.ablation import CHOSEN, NOTHING, OTHER, Without, ablated
from moejax.config import Config
from moejax.data import Batch
from moejax.model import MoE, Transformer
from moejax.training.evaluate import bits_per_byte, total
from moejax.training.saved import SavedRun
from moejax.training.step import EvalSums, eval_step

RANKS = 4  # at most, of a router with many choices
CONTROLS = {"chosen": CHOSEN, "other": OTHER}


def ablate(run: SavedRun, batches: Iterable[Batch]) -> dict[str, Any]:
    """Bits per byte with and without.

    Args:
      run: a saved run whose layers route.
      batches: text, as for `traces`.

    Returns:
      whole: nothing taken away. In all layers at once: rank, a list by rank of choice; chosen and
      other, the controls: a random one of the token's experts, and of those it has not. In one
      layer alone, lists by layer: rank_0_layer, chosen_layer, other_layer.
    """
    config, program = run.config, run.program
    layers, ranks = config.moe_layers, min(RANKS, max(1, round(config.choices)))
    # One domain: rows of none would not be counted, and padding has no token that counts.
    placed = [
        program.put(batch._replace(domain_B=np.zeros_like(batch.domain_B))) for batch in batches
    ]
    step = _step(config, run.dataset.vocab_size, program.mesh)

    def cost(which_L: list[int]) -> float:
        state = Without(jnp.array(which_L, jnp.int32), run.state.router_state)
        sums = total(step, run.state._replace(router_state=state), placed, run.dataset.bytes_V)
        return bits_per_byte(sums.nll_domain.sum(), sums.bytes_domain.sum())

    everywhere = {name: cost([which] * layers) for name, which in CONTROLS.items()}
    alone = {
        f"{name}_layer": [cost(which_L) for which_L in _one_layer(which, layers)]
        for name, which in {"rank_0": 0, **CONTROLS}.items()
    }
    ranked = [cost([rank] * layers) for rank in range(ranks)]
    return {"whole": cost([NOTHING] * layers), "rank": ranked, **everywhere, **alone}


def _one_layer(which: int, layers: int) -> Iterator[list[int]]:
    for layer in range(layers):
        yield [which if layer == each else NOTHING for each in range(layers)]


@functools.lru_cache(maxsize=8)
def _step(config: Config, vocab_size: int, mesh: Mesh) -> Callable[..., EvalSums]:
    """The evaluation step of the model with its routers ablated; one program for all cases."""
    graph = _ablated_graph(config, vocab_size)
    step = functools.partial(eval_step, graph=graph, domains=1)
    jitted = jax.jit(step, out_shardings=NamedSharding(mesh, P()))

    def evaluate(*arguments: Any) -> EvalSums:
        with jax.set_mesh(mesh):
            return jitted(*arguments)

    return evaluate


def _ablated_graph(config: Config, vocab_size: int) -> Any:
    """`make_graph` of the config as evaluation routes, with another router in each layer."""
    config = dataclasses.replace(config, moe=config.moe.evaluation())
    model = nnx.eval_shape(lambda: Transformer(config, vocab_size, nnx.Rngs(params=0)))
    for unit in model.stacks:
        for block in unit.blocks:
            if isinstance(layer := block.feed_forward, MoE):
                layer.options = layer.options._replace(router=ablated(layer.options.router))
    return nnx.split(model)[0]
