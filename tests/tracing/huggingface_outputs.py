"""What tiny random models of transformers return and choose, written once to huggingface.json:

pip install torch transformers && python -m tests.tracing.huggingface_outputs
"""

import json
import pathlib
from typing import Any

FILE = pathlib.Path(__file__).parent / "huggingface.json"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 1.0,
}
# Of DeepSeek-V3 every layer has experts here, in four groups of which two are open.
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 0}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 8},
    "Olmoe": {"num_experts": 8},
    "Qwen3Moe": {"num_experts": 8, "norm_topk_prob": True, "head_dim": 8},
    "DeepseekV3": {"n_routed_experts": 8, "v_head_dim": 8, **LATENT, **GROUPS},
}
KEPT = ("model_type", "num_experts_per_tok", "norm_topk_prob")


def outputs(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """One model's logits, and its routers' own experts and weights, [L, B * S, ...]."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    chosen: list[tuple[Any, Any]] = []
    biases = []
    for part in model.modules():
        if type(part).__name__.lower().endswith("topkrouter"):
            part.register_forward_hook(lambda *a: chosen.append((a[2][1], a[2][2])))
            bias = getattr(part, "e_score_correction_bias", None)
            if bias is not None:
                biases.append(bias.uniform_(-0.3, 0.3).tolist())
    ids = torch.randint(1, 64, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_router_logits=True)
    known = config.to_dict()
    return {
        "config": {key: known[key] for key in (*KEPT, *GROUPS) if key in known},
        "input_ids": ids.tolist(),
        "attention_mask": mask.tolist(),
        "predicted": out.logits.argmax(-1).tolist(),
        "bias_LE": biases or None,
        "router_logits": [
            [[round(x, 6) for x in t] for t in a.tolist()] for a in out.router_logits
        ],
        "expert_LTK": [experts.tolist() for _, experts in chosen],
        "weight_LTK": [weights.tolist() for weights, _ in chosen],
    }


if __name__ == "__main__":
    import transformers

    made = {name: outputs(name, changes) for name, changes in MODELS.items()}
    FILE.write_text(json.dumps({"transformers": transformers.__version__, **made}))
