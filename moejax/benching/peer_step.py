"""A training step of Hugging Face's Mixtral in PyTorch, at the sizes of ours: extra `bench`."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from moejax.config import Config


def mixtral_step(made: Config, vocab_size: int) -> Callable[[Any, Any], float]:
    """(tokens_BS, targets_BS) -> loss: forward, backward, clipping and AdamW in float32, on all
    cores.

    The model is that of the config: as many layers, heads, experts and choices, of the same widths,
    no weights tied. Its loss is cross entropy alone, so it does no more than ours.
    """
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=made.model.dim,
        intermediate_size=made.model.ffn,
        num_hidden_layers=made.model.layers,
        num_attention_heads=made.model.heads,
        num_key_value_heads=made.model.key_value_heads,
        num_local_experts=made.moe.experts,
        num_experts_per_tok=int(made.choices),
        max_position_embeddings=made.data.sequence,
        tie_word_embeddings=False,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"  # 2-4 times as fast as "eager" on a CPU
    model = MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=made.optimizer.learning_rate)

    def step(tokens_BS: Any, targets_BS: Any) -> float:
        tokens, targets = (torch.from_numpy(np.array(a, np.int64)) for a in (tokens_BS, targets_BS))
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), made.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
