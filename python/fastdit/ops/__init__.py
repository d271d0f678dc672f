"""The operators of fastdit: functional, differentiable, torch.compile-safe; `help` on each has its formula."""

from ._explain import explain
from .modulation import gate_residual, gate_residual_norm_modulate, norm_modulate

__all__ = [
    "explain",
    "gate_residual",
    "gate_residual_norm_modulate",
    "norm_modulate",
]
