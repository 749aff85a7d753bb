"""Other frameworks' balance losses as rows of a table, and their coefficients in our terms.

Nearly all are E sum_e f_e P_e times a power of E, K or T. A coefficient without that power means
nothing: between Levanter's 1/K and MaxText's K lies K^2, between GShard's paper and its code E^2.

    loss = convention_loss("hf_mixtral", prob_LTE=p, expert_LTK=chosen)
    config.balance.update(to_moejax("hf_mixtral", 0.02, k=2, experts=8))
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.names import did_you_mean
from moejax.routing.balance import squared_cv
from moejax.routing.noisy import chance_above


class Convention(NamedTuple):
    """A framework's balance loss, as far as it differs from E sum_e f_e P_e of one layer's batch.

    Attributes:
      source: where the formula stands.
      counts: which choices f counts, before dropping: 'all' K, f = n / (K T), or 'first', f = n /
        T. 'importance': no counts; the loss is the squared coefficient of variation of the summed
        probabilities. 'load': the same, of the probability of being chosen again under new noise.
        'importance+load': the mean of both.
      power: letter -> exponent of what the framework multiplies by: E experts, K choices, T tokens
        of one scope, W workers. At perfect balance the loss is that product (CV^2: 0) for a layer.
      scope: what f and P are formed over: the 'batch'; or each 'group', 'sequence' or 'micro'
        batch on its own, then the mean; 'global': f over all microbatches, P over each.
      layers: how layers are put together: 'mean' (also where the framework hands its user one loss
        a layer), 'sum', or 'concatenated': the tokens of all layers as one batch.
      probs: 'all', or 'chosen': divided by their sum over the chosen experts, 0 elsewhere.
      unbiased: CV^2 divides by E - 1 instead of E.
      z: whether the framework has the router z-loss, in the same scope.
    """

    source: str
    counts: str = "all"
    power: Mapping[str, int] = {}
    scope: str = "batch"
    layers: str = "mean"
    probs: str = "all"
    unbiased: bool = False
    z: bool = False


CONVENTIONS: dict[str, Convention] = {
    "moejax": Convention("moejax.routing.balance", z=True),
    "switch": Convention("Fedus et al. 2021, 2101.03961, eq. 4", "first", layers="sum"),
    "gshard_paper": Convention("Lepikhin et al. 2020, 2006.16668, algorithm 1", "first", {"E": -2}),
    "gshard": Convention("Lingvo: the paper's times E^2", "first", scope="group"),
    "mesh_tensorflow": Convention(
        "mesh_tensorflow/transformer/moe.py", "first", scope="group", layers="sum", z=True
    ),
    "flaxformer": Convention(
        "flaxformer/architectures/moe/routing.py", power={"K": 1}, scope="group", z=True
    ),
    "praxis": Convention("praxis/gshard_utils.py", "first", scope="group"),
    "vmoe_gshard": Convention("vmoe/nn/routing.py", "first", scope="group", layers="sum"),
    "vmoe_importance": Convention("vmoe/nn/routing.py", "importance", scope="group", layers="sum"),
    "vmoe_load": Convention("vmoe/nn/routing.py", "load", scope="group", layers="sum"),
    "vmoe": Convention(
        "Riquelme et al. 2021, 2106.05974", "importance+load", scope="group", layers="sum"
    ),
    "axlearn": Convention("axlearn/common/mixture_of_experts.py, top-k", scope="group", z=True),
    "axlearn_top2": Convention(
        "axlearn/common/mixture_of_experts.py, top-2", "first", scope="group", z=True
    ),
    "maxtext": Convention("MaxText/layers/moe.py", power={"K": 1}, scope="sequence"),
    "levanter": Convention("levanter/models/mixtral.py", power={"K": -1}, z=True),
    "marin_grug": Convention("marin, experiments/grug/moe/model.py", power={"K": 1}),
    "easydel_standard": Convention(
        "easydel/layers/moe/_moe_module.py, STANDARD", power={"T": 1}, z=True
    ),
    "easydel_switch": Convention(
        "easydel/layers/moe/_moe_module.py, SWITCH_TRANSFORMER", power={"K": 1}, z=True
    ),
    "simply": Convention("simply/model_lib.py"),
    "transformer_engine": Convention("TransformerEngine, fused router"),
    "hf_switch": Convention(
        "transformers, switch_transformers",
        "first",
        scope="sequence",
        layers="concatenated",
        z=True,
    ),
    "hf_mixtral": Convention("transformers, mixtral", power={"K": 1}, layers="concatenated"),
    "hf_olmoe": Convention("transformers, olmoe", power={"K": 1}, layers="concatenated"),
    "st_moe_pytorch": Convention("lucidrains/st-moe-pytorch", "first", z=True),
    "megatron_micro": Convention("megatron, aux_loss", scope="micro", layers="sum", z=True),
    "megatron_sequence": Convention(
        "megatron, seq_aux_loss", scope="sequence", layers="sum", z=True
    ),
    "megatron_global": Convention(
        "megatron, global_aux_loss, as it stands at the last microbatch",
        scope="global",
        layers="sum",
        z=True,
    ),
    "megablocks": Convention("megablocks/layers/moe.py, its own weight w left out", z=True),
    "deepspeed_top1": Convention("deepspeed/moe/sharded_moe.py, top1gating", "first"),
    "deepspeed_top2": Convention("deepspeed/moe/sharded_moe.py, top2gating", "first"),
    "deepspeed_topk": Convention("deepspeed/moe/sharded_moe.py, topkgating"),
    "olmo_core": Convention("olmo_core/nn/moe/loss.py, batch", z=True),
    "olmo_core_instance": Convention(
        "olmo_core/nn/moe/loss.py, instance", scope="sequence", z=True
    ),
    "tutel": Convention("tutel/impls/losses.py, gshard_loss", "first"),
    "tutel_importance": Convention("tutel/impls/losses.py", "importance", unbiased=True),
    "fairscale": Convention("fairscale/nn/moe/top2gate.py", "first", {"E": -2}),
    "fastmoe": Convention("fmoe/gates/gshard_gate.py, E / W experts a worker", "first", {"W": -2}),
    "nanomoe": Convention("nanoMoE, model.py", power={"K": 1}, probs="chosen"),
    "deepseek_moe": Convention("Dai et al. 2024, 2401.06066, eq. 12"),
    "deepseek_v3": Convention("DeepSeek-V3, 2412.19437, eq. 17", scope="sequence"),
}


def convention(name: str) -> Convention:
    """The row of a name. Raises ValueError, with the nearest name, where there is none."""
    if name not in CONVENTIONS:
        raise ValueError(f"unknown convention {name!r}{did_you_mean(name, CONVENTIONS)}")
    return CONVENTIONS[name]


def value_at_balance(
    name: str, *, k: int, experts: int, tokens: int = 1, layers: int = 1, workers: int = 1
) -> float:
    """The loss of unit coefficient where P is uniform and every expert is chosen as often."""
    row = convention(name)
    if row.counts not in ("all", "first"):
        return 0.0
    size = {"E": experts, "K": k, "T": tokens, "W": workers}
    factor = math.prod(float(size[letter]) ** power for letter, power in row.power.items())
    return factor * (layers if row.layers == "sum" else 1)


def to_moejax(
    name: str,
    coefficient: float,
    *,
    k: int,
    experts: int,
    tokens: int = 0,
    layers: int = 0,
    workers: int = 0,
    loss: str = "balance",
) -> dict[str, float]:
    """A framework's coefficient as the weight of moejax's loss that adds the same to the objective.

    The same exactly where the framework forms f and P over one layer's whole batch; otherwise the
    same at balance.

    Args:
      name: of CONVENTIONS.
      coefficient: what the framework multiplies its loss by.
      k, experts: K and E.
      tokens: T of one scope, for those whose loss grows with it.
      layers: MoE layers, for those that add their layers' losses: moejax takes the mean.
      workers: W, for those whose loss shrinks with it.
      loss: 'balance' or 'z'.

    Returns:
      {loss: weight}, for `config.balance.update`.

    Raises:
      ValueError: unknown name, a size it needs, or a loss that is no multiple of moejax's.
    """
    row = convention(name)
    _check_loss(name, row, loss)
    sizes = {"tokens": (tokens, "T"), "workers": (workers, "W")}
    for size, (given, letter) in sizes.items():
        if loss == "balance" and letter in row.power and not given:
            raise ValueError(f"{name}: its loss depends on the number of {size}; give {size}=")
    if row.layers == "sum" and not layers:
        raise ValueError(f"{name} adds the losses of its layers; give layers= (MoE layers)")
    if loss == "z":
        return {"router_z": coefficient * (layers if row.layers == "sum" else 1)}
    if row.counts not in ("all", "first") or row.probs != "all":
        what = row.counts if row.probs == "all" else "probabilities over the chosen only"
        raise ValueError(f"{name} has no equal coefficient of load_balance: its loss is of {what}")
    ours = "load_balance" if row.counts == "all" or k == 1 else "load_balance_top1"
    sized = {"tokens": tokens, "layers": layers, "workers": workers}
    return {ours: coefficient * value_at_balance(name, k=k, experts=experts, **sized)}


def convention_loss(
    name: str,
    *,
    prob_LTE: jax.Array | None = None,
    logits_LTE: jax.Array | None = None,
    expert_LTK: jax.Array | None = None,
    valid_T: jax.Array | None = None,
    noisy_LTE: jax.Array | None = None,
    noise_std: float = 0.0,
    sequences: int = 1,
    microbatches: int = 1,
    groups: int = 1,
    workers: int = 1,
    loss: str = "balance",
) -> jax.Array:
    """A framework's balance loss, of unit coefficient, from what its routers said.

    T tokens are counted sequence by sequence; groups and microbatches are whole runs of them.

    Args:
      name: of CONVENTIONS.
      prob_LTE: float32 probabilities, used as given; None = softmax of the logits. Gradients flow
        through them.
      logits_LTE: float32; for the z-loss, and for 'load' (those without noise).
      expert_LTK: int32 choices, best first; an entry of E or more counts nowhere.
      valid_T: bool, True = a real token; None = all are.
      noisy_LTE, noise_std: for 'load': the logits that chose, and their noise's deviation.
      sequences, microbatches, groups: how many the T tokens are, where the scope asks for them.
      workers: W.
      loss: 'balance', or 'z': the mean over valid tokens of logsumexp(logits)^2.

    Raises:
      ValueError: unknown name, an array that the loss needs, or tokens that do not divide.
    """
    row = convention(name)
    _check_loss(name, row, loss)
    given: dict[str, Any] = {
        "logits_LTE": logits_LTE,
        "expert_LTK": expert_LTK,
        "noisy_LTE": noisy_LTE,
    }
    given["prob_LTE or logits_LTE"] = logits_LTE if prob_LTE is None else prob_LTE
    for what in _needs(row, loss):
        if given[what] is None:
            raise ValueError(f"the {loss} loss of {name} needs {what}")
    if loss == "balance" and "load" in row.counts and noise_std <= 0:
        raise ValueError(f"the load loss of {name} needs noise_std > 0, got {noise_std}")
    p: Any = jax.nn.softmax(given["logits_LTE"]) if prob_LTE is None else prob_LTE
    num_layers, num_tokens, num_experts = p.shape
    parts = {"group": groups, "sequence": sequences, "micro": microbatches, "global": microbatches}
    scopes = parts.get(row.scope, 1)
    if num_tokens % scopes:
        raise ValueError(
            f"{name}: {num_tokens} tokens are not divisible into {scopes} ({row.scope} scope)"
        )
    valid_T = jnp.ones(num_tokens, bool) if valid_T is None else valid_T
    valid_LT = jnp.broadcast_to(valid_T[None], (num_layers, num_tokens))
    cut = functools.partial(_cut, scopes=scopes, concatenate=row.layers == "concatenated")
    valid_LPT = cut(valid_LT)

    def total(a_LTX: jax.Array) -> jax.Array:
        """Sum over the valid tokens of each scope, [L, scopes, X]."""
        return jnp.where(valid_LPT[..., None], cut(a_LTX), 0.0).sum(2)

    logits: Any = logits_LTE
    if loss == "z":
        z_LPX = total(jnp.square(jax.nn.logsumexp(logits, axis=-1, keepdims=True)))
        value_LP = z_LPX[..., 0] / jnp.maximum(valid_LPT.sum(-1), 1)
    elif row.counts in ("all", "first"):
        value_LP = _product(row, p, expert_LTK, valid_LPT.sum(-1), total, workers)
    else:
        spread = [p] if "importance" in row.counts else []
        if "load" in row.counts:
            k = given["expert_LTK"].shape[-1]
            spread.append(chance_above(logits, given["noisy_LTE"], noise_std, k))
        value_LP = jnp.stack([squared_cv(total(a), row.unbiased) for a in spread]).mean(0)
    real_LP = valid_LPT.any(-1)
    value_L = jnp.where(real_LP, value_LP, 0.0).sum(1) / jnp.maximum(real_LP.sum(1), 1)
    return value_L.sum() if row.layers == "sum" else value_L.mean()


def _product(
    row: Convention,
    prob_LTE: jax.Array,
    expert_LTK: Any,
    tokens_LP: jax.Array,
    total: Callable[[jax.Array], jax.Array],
    workers: int,
) -> jax.Array:
    """E sum_e f_e P_e of each layer and scope, times the row's powers."""
    num_experts, k = prob_LTE.shape[-1], expert_LTK.shape[-1]
    chosen_LTKE = jax.nn.one_hot(expert_LTK, num_experts)
    if row.probs == "chosen":
        prob_LTE = prob_LTE * chosen_LTKE.sum(2)
        prob_LTE = prob_LTE / jnp.maximum(prob_LTE.sum(-1, keepdims=True), 1e-20)
    choices = 1 if row.counts == "first" else k
    count_LPE, pool_LP = total(chosen_LTKE[:, :, :choices].sum(2)), tokens_LP
    if row.scope == "global":
        count_LPE = jnp.broadcast_to(count_LPE.sum(1, keepdims=True), count_LPE.shape)
        pool_LP = jnp.broadcast_to(tokens_LP.sum(1, keepdims=True), tokens_LP.shape)
    share_LPE = count_LPE / (choices * jnp.maximum(pool_LP, 1)[..., None])
    prob_LPE = total(prob_LTE) / jnp.maximum(tokens_LP, 1)[..., None]
    value_LP = num_experts * (share_LPE * prob_LPE).sum(-1)
    size = {"E": num_experts, "K": k, "T": tokens_LP, "W": workers}
    for letter, power in row.power.items():
        value_LP = value_LP * jnp.asarray(size[letter], jnp.float32) ** power
    return value_LP


def _needs(row: Convention, loss: str) -> list[str]:
    """The arrays without which a loss cannot be formed."""
    if loss == "z":
        return ["logits_LTE"]
    if "load" in row.counts:
        return ["logits_LTE", "noisy_LTE", "expert_LTK"]
    needs = ["prob_LTE or logits_LTE"]
    return needs if row.counts == "importance" else [*needs, "expert_LTK"]


def _cut(a_LT: jax.Array, scopes: int, concatenate: bool) -> jax.Array:
    """[L, T, ...] to [L, scopes, T of a scope, ...]; to one layer that has the tokens of all."""
    num_layers, num_tokens, *rest = a_LT.shape
    a_LPT = a_LT.reshape(num_layers, scopes, num_tokens // scopes, *rest)
    if concatenate:
        a_LPT = jnp.swapaxes(a_LPT, 0, 1).reshape(1, scopes, -1, *rest)
    return a_LPT


def _check_loss(name: str, row: Convention, loss: str) -> None:
    if loss not in ("balance", "z"):
        raise ValueError(f"unknown loss {loss!r}: use 'balance' or 'z'")
    if loss == "z" and not row.z:
        raise ValueError(f"{name} has no router z-loss")
