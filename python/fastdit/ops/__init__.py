"""The operators of fastdit: functional, differentiable, torch.compile-safe; `help` on each has its formula."""

from ._explain import explain
from .conv import causal_conv3d, next_cache, norm_silu
from .modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from .patch import patch_embed3d, unpatchify3d
from .rotary import qk_norm_rope, rope_table

__all__ = [
    "causal_conv3d",
    "explain",
    "gate_residual",
    "gate_residual_norm_modulate",
    "next_cache",
    "norm_modulate",
    "norm_silu",
    "patch_embed3d",
    "qk_norm_rope",
    "rope_table",
    "unpatchify3d",
]
