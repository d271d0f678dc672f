"""diffusers' AdaLayerNormContinuous: the modulated norm before the output layer of most models.

CogView4's and GLM-Image's have no SiLU.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.joint import affine, is_diffusers_rms
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown


def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    if has(self, "silu"):
        conditioning_embedding = self.silu(conditioning_embedding)
    scale, shift = self.linear(conditioning_embedding.to(x.dtype)).chunk(2, dim=1)
    return ops.norm_modulate(x, shift=shift, scale=scale, **affine(self.norm, law(self, x, scale)))


def refuse(module: Any) -> str | None:
    if type(module.norm) is not nn.LayerNorm and not is_diffusers_rms(module.norm):
        return f"its norm is a {type(module.norm).__name__}, not a LayerNorm or an RMSNorm"
    return unknown(module, "silu", "linear", "norm")


register(
    Kind(
        name="output norm (AdaLayerNormContinuous)",
        ops=("norm_modulate",),
        match=lambda m: (
            has(m, "linear", "norm")
            and type(getattr(m, "silu", None)) in (nn.SiLU, type(None))
            and parameters(m) == ["x", "conditioning_embedding"]
        ),
        refuse=refuse,
        patches=lambda m: [(m, "forward", forward)],
        absorbs=lambda m: [m.norm],
        # passes over (tokens, C): norm 2, scale 2, shift 2 against 2
        saving=lambda m: 4 * m.linear.out_features // 2 * itemsize(m),
    )
)
