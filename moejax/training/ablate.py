"""What text costs a model that does without: without its shared experts, or some experts of each
token. Nothing is trained again."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.analysis.ablation import CHOSEN, NOTHING, OTHER, Without, best
from moejax.config import Config
from moejax.data import Batch, TextDataset
from moejax.training.evaluate import bits_per_byte, evaluation_batches, total
from moejax.training.program import Program
from moejax.training.saved import SavedRun
from moejax.training.state import TrainState

RANKS = 4  # at most, of a router with many choices
CONTROLS = {"chosen": CHOSEN, "other": OTHER}
SHARES = (1 / 16, 1 / 8, 1 / 4)  # of the experts, so that models with few and many compare


def without(
    config: Config, program: Program, state: TrainState, dataset: TextDataset
) -> dict[str, dict[str, float]]:
    """What an evaluation record holds besides: `without`, bits per byte of the same text.

    Returns:
      shared: the outputs of all shared experts are zero. best_0.0625, best_0.125, best_0.25: in all
      layers, each token's router chooses among the experts that are left without the best ones,
      this share of them, rounded (DeepSeekMoE, Dai et al. 2024, 2401.06066, section 4.5). What
      a model does not have is left out, such as a share that is no expert; {} if nothing is left.
    """
    batches, layers = evaluation_batches(config, program, dataset), config.moe_layers
    experts, found = config.moe.experts, {}
    if experts and config.moe.shared:
        alone = state._replace(params=_without_shared(state.params))
        found["shared"] = cost(program, alone, batches, dataset.bytes_V, [NOTHING] * layers)
    for share in SHARES:
        if count := round(share * experts):
            which_L = [best(count)] * layers
            found[f"best_{share:g}"] = cost(program, state, batches, dataset.bytes_V, which_L)
    return {"without": found} if found else {}


def ablate(run: SavedRun, batches: Iterable[Batch]) -> dict[str, Any]:
    """Bits per byte with and without single experts.

    Args:
      run: a saved run whose layers route.
      batches: text, as for `traces`.

    Returns:
      whole: nothing taken away. In all layers at once: rank, a list by rank of choice; chosen and
      other, the controls: a random one of the token's experts, and of those it has not. In one
      layer alone, lists by layer: rank_0_layer, chosen_layer, other_layer.
    """
    program, layers = run.program, run.config.moe_layers
    ranks = min(RANKS, max(1, round(run.config.choices)))
    # One domain: rows of none would not be counted, and padding has no token that counts.
    placed = [
        program.put(batch._replace(domain_B=np.zeros_like(batch.domain_B))) for batch in batches
    ]

    def costs(which_L: list[int]) -> float:
        return cost(program, run.state, placed, run.dataset.bytes_V, which_L)

    everywhere = {name: costs([which] * layers) for name, which in CONTROLS.items()}
    alone = {
        f"{name}_layer": [costs(which_L) for which_L in _one_layer(which, layers)]
        for name, which in {"rank_0": 0, **CONTROLS}.items()
    }
    ranked = [costs([rank] * layers) for rank in range(ranks)]
    return {"whole": costs([NOTHING] * layers), "rank": ranked, **everywhere, **alone}


def cost(
    program: Program,
    state: TrainState,
    batches: Iterable[Batch],
    bytes_V: np.ndarray,
    which_L: Sequence[int],
) -> float:
    """Bits per byte of batches on the devices, each MoE layer without what `Without.which` says."""
    which: Any = np.array(which_L, np.int32)  # not an array on this process's devices alone
    state = state._replace(router_state=Without(which, state.router_state))
    sums = total(program.eval_without, state, batches, bytes_V)
    return bits_per_byte(sums.nll_domain.sum(), sums.bytes_domain.sum())


def _without_shared(params: Any) -> Any:
    """The parameters with those of all shared experts zero: then so is what they give."""

    def kept(path: Any, a: jax.Array) -> jax.Array:
        shared = any(getattr(key, "key", None) == "shared" for key in path)
        return jnp.zeros_like(a) if shared else a

    return jax.tree.map_with_path(kept, params)


def _one_layer(which: int, layers: int) -> Iterator[list[int]]:
    for layer in range(layers):
        yield [which if layer == each else NOTHING for each in range(layers)]
