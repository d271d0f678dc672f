"""The operators of fastdit: functional, differentiable, torch.compile-safe; `help` on each has its formula."""

from ._explain import explain
from .attention import attention, attention_varlen, merge_attention
from .modulation import gate_residual, gate_residual_norm_modulate, norm_modulate

__all__ = [
    "attention",
    "attention_varlen",
    "explain",
    "gate_residual",
    "gate_residual_norm_modulate",
    "merge_attention",
    "norm_modulate",
]
