"""Traces of models of Hugging Face's transformers, from what they return with
`output_router_logits=True`: each layer's logits, of which the router's choices are made again here.

    with torch.no_grad():
        out = model(**tokens, output_router_logits=True)
    trace = trace_of_outputs(out.router_logits, tokens["input_ids"],
                             gate_of(model.config.to_dict()), tokens["attention_mask"])

NumPy only. Checked against the experts and weights that transformers 5.24 itself chose.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from moejax.tracing.rows import trace_of_rows
from moejax.tracing.schema import Trace, TraceMeta


@dataclasses.dataclass(frozen=True)
class Gate:
    """How a model makes experts and weights of a token's logits.

    Attributes:
      k: experts a token.
      scores: of the logits, softmax or sigmoid; the k highest are chosen.
      renormalise: divide the weights by their sum over the chosen.
      scale: what weights are multiplied with at the end.
      groups, top_groups: experts stand in so many groups, and a token may choose from that many of
        them, the ones with the highest sum of their two best scores (DeepSeek-V3).
    """

    k: int
    scores: str = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if self.scores not in ("softmax", "sigmoid"):
            raise ValueError(f"unknown scores {self.scores!r}: use softmax or sigmoid")


def gate_of(config: Mapping[str, Any]) -> Gate:
    """The gate of a model by its `config.to_dict()`, or config.json.

    Raises:
      ValueError: a kind of model that is not known here.
    """
    kind = config.get("model_type", "")
    if kind == "mixtral":
        return Gate(config["num_experts_per_tok"], renormalise=True)
    if kind in ("olmoe", "qwen2_moe", "qwen3_moe"):
        return Gate(config["num_experts_per_tok"], renormalise=config["norm_topk_prob"])
    if kind == "deepseek_v3":
        return Gate(
            *(config["num_experts_per_tok"], "sigmoid", config["norm_topk_prob"]),
            *(config["routed_scaling_factor"], config["n_group"], config["topk_group"]),
        )
    raise ValueError(
        f"how model_type={kind!r} weighs its experts is not known here (known: mixtral, olmoe, "
        "qwen2_moe, qwen3_moe, deepseek_v3); say it by a Gate"
    )


def trace_of_outputs(
    router_logits: Sequence[Any],
    input_ids: Any,
    gate: Gate,
    attention_mask: Any = None,
    *,
    bias_LE: Any = None,
    layers: Sequence[int] = (),
    vocabulary: int = 0,
    tokenizer: str = "",
    predicted: Any = None,
) -> Trace:
    """The trace of one batch. The last token of a row, whose target is not known, is left out.

    Args:
      router_logits: for each layer with experts [B * S, E], float32 (`.float()` where bfloat16).
      input_ids: int [B, S].
      gate: see `gate_of`.
      attention_mask: [B, S], 0 = padding, on either side; None = all tokens are real.
      bias_LE: DeepSeek-V3's `e_score_correction_bias` of each layer: it chooses, but weighs not.
      layers: their numbers in the model; () = 0, 1, ...
      vocabulary, tokenizer: see `TraceMeta`.
      predicted: the model's best guess for the token after each, int [B, S]; None = not kept.

    Raises:
      ValueError: no layer's logits, or of another shape than the ids, or probabilities.
    """
    token_BS = np.asarray(input_ids)
    logits_LTE = _checked([np.asarray(a, np.float32) for a in router_logits], token_BS)
    num_layers, _, num_experts = logits_LTE.shape
    bias_LE = np.zeros((num_layers, num_experts)) if bias_LE is None else np.asarray(bias_LE)
    decided = [_decide(a, b, gate) for a, b in zip(logits_LTE, bias_LE, strict=True)]
    columns = {
        name: np.stack([each[name] for each in decided]).reshape(
            num_layers, *token_BS.shape, *decided[0][name].shape[1:]
        )
        for name in decided[0]
    }
    meta = TraceMeta(
        experts=num_experts,
        layers=tuple(layers) or tuple(range(num_layers)),
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        source="transformers",
    )
    return trace_of_rows(
        meta, _rows(token_BS, attention_mask), SimpleNamespace(**columns), predicted
    )


def _checked(logits: Sequence[np.ndarray], token_BS: np.ndarray) -> np.ndarray:
    if not logits:
        raise ValueError("no router logits: give output_router_logits=True to the model's call")
    for layer, logits_TE in enumerate(logits):
        if logits_TE.ndim != 2 or logits_TE.shape[0] != token_BS.size:
            raise ValueError(
                f"router_logits[{layer}] is of shape {logits_TE.shape}, wanted [B * S, E] of "
                f"input_ids {token_BS.shape}: ({token_BS.size}, experts)"
            )
        if np.all(logits_TE >= 0) and np.allclose(logits_TE.sum(-1), 1, atol=1e-3):
            raise ValueError(
                f"router_logits[{layer}] are probabilities, not logits: some versions of "
                "transformers return them so; give their logarithms"
            )
    return np.stack(logits)


def _decide(logits_TE: np.ndarray, bias_E: np.ndarray, gate: Gate) -> dict[str, np.ndarray]:
    """One layer's decisions by token, under the names of `moejax.routing.Decisions`."""
    raised_TE = np.exp(logits_TE - logits_TE.max(-1, keepdims=True))
    prob_TE = raised_TE / raised_TE.sum(-1, keepdims=True)
    scores_TE = prob_TE if gate.scores == "softmax" else 1 / (1 + np.exp(-logits_TE))
    choice_TE = _in_best_groups(scores_TE + bias_E, gate)
    expert_TK = np.argsort(-choice_TE, axis=-1, kind="stable")[:, : gate.k]
    weight_TK = np.take_along_axis(scores_TE, expert_TK, -1)
    if gate.renormalise:
        weight_TK = weight_TK / np.maximum(weight_TK.sum(-1, keepdims=True), 1e-20)
    chosen_TE = np.zeros(scores_TE.shape, bool)
    np.put_along_axis(chosen_TE, expert_TK, True, -1)
    share_TE = scores_TE / scores_TE.sum(-1, keepdims=True)
    least_T = np.where(chosen_TE, scores_TE, np.inf).min(-1)
    margin_T = least_T - np.where(chosen_TE, -np.inf, scores_TE).max(-1)
    return {
        "expert_TR": expert_TK,
        "weight_TR": gate.scale * weight_TK,
        "dropped_TR": np.zeros(expert_TK.shape, bool),
        "entropy_T": -(share_TE * np.log(np.where(share_TE > 0, share_TE, 1))).sum(-1),
        "margin_T": np.where(np.isfinite(margin_T), margin_T, np.nan),
        "scores_TE": scores_TE,
    }


def _in_best_groups(choice_TE: np.ndarray, gate: Gate) -> np.ndarray:
    """-inf for the experts of groups that a token may not choose from."""
    if gate.top_groups == gate.groups:
        return choice_TE
    choice_TGE = choice_TE.reshape(len(choice_TE), gate.groups, -1)
    value_TG = np.sort(choice_TGE, axis=-1)[..., -2:].sum(-1)
    best_TG = np.argsort(-value_TG, axis=-1, kind="stable")[:, : gate.top_groups]
    open_TG1 = np.zeros((*value_TG.shape, 1), bool)
    np.put_along_axis(open_TG1[..., 0], best_TG, True, -1)
    return np.where(open_TG1, choice_TGE, -np.inf).reshape(choice_TE.shape)


def _rows(token_BS: np.ndarray, attention_mask: Any) -> SimpleNamespace:
    """A batch of `moejax.data`: each row one document, of the real tokens that have a target."""
    real_BS = np.ones(token_BS.shape, bool)
    if attention_mask is not None:
        real_BS = np.asarray(attention_mask).astype(bool)
    valid_BS = np.zeros_like(real_BS)
    valid_BS[:, :-1] = real_BS[:, :-1] & real_BS[:, 1:]
    return SimpleNamespace(
        tokens_BS=token_BS,
        targets_BS=np.roll(token_BS, -1, axis=1),
        segment_BS=np.zeros(token_BS.shape, np.int32),
        position_BS=np.cumsum(real_BS, axis=1) - 1,
        valid_BS=valid_BS,
        domain_B=np.full(len(token_BS), -1),
    )
