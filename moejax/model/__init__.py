"""The model: a transformer, and `MoE` and `SoftMoE`, its layers with experts."""

from moejax.model.moe import MoE
from moejax.model.soft import SoftMoE
from moejax.model.transformer import Transformer

__all__ = ["MoE", "SoftMoE", "Transformer"]
