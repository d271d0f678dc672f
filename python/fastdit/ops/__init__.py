"""The operators of fastdit: functional, differentiable, torch.compile-safe; `help` on each has its formula."""

from ._explain import explain
from .activation import activation
from .adaln import adaln_attention, adaln_mlp
from .attention import attention, attention_varlen, merge_attention
from .conv import causal_conv3d, next_cache, norm_silu
from .modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from .patch import patch_embed3d, unpatchify3d
from .rotary import qk_norm_rope, rope_table

__all__ = [
    "activation",
    "adaln_attention",
    "adaln_mlp",
    "attention",
    "attention_varlen",
    "causal_conv3d",
    "explain",
    "gate_residual",
    "gate_residual_norm_modulate",
    "merge_attention",
    "next_cache",
    "norm_modulate",
    "norm_silu",
    "patch_embed3d",
    "qk_norm_rope",
    "rope_table",
    "unpatchify3d",
]
