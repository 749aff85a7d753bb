"""The model: a transformer, and `MoE`, its layer with experts."""

from moejax.model.moe import MoE
from moejax.model.transformer import Transformer

__all__ = ["MoE", "Transformer"]
