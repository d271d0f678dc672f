"""The operators of fastdit: functional, differentiable, torch.compile-safe; `help` on each has its formula."""

from ._explain import explain
from .adaln import adaln_attention, adaln_mlp
from .attention import attention, attention_varlen, merge_attention
from .modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from .rotary import qk_norm_rope, rope_table

__all__ = [
    "adaln_attention",
    "adaln_mlp",
    "attention",
    "attention_varlen",
    "explain",
    "gate_residual",
    "gate_residual_norm_modulate",
    "merge_attention",
    "norm_modulate",
    "qk_norm_rope",
    "rope_table",
]
