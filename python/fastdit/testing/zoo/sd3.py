"""diffusers' SD3Transformer2DModel: SD3, SD3.5 large (query and key norm), SD3.5 medium (two attentions)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn


def sd3(**config) -> Any:
    from diffusers import SD3Transformer2DModel

    small = dict(sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=24,
                 num_attention_heads=3, joint_attention_dim=32, caption_projection_dim=72, pooled_projection_dim=20,
                 pos_embed_max_size=6)  # fmt: skip
    return randomize(SD3Transformer2DModel(**{**small, **config}))


def controlnet(**config: Any) -> Any:
    """SD3.5's ControlNet, whose blocks see the image alone."""
    from diffusers import SD3ControlNetModel

    small = dict(sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=24,
                 num_attention_heads=3, joint_attention_dim=None, caption_projection_dim=72, pooled_projection_dim=20,
                 pos_embed_max_size=6, extra_conditioning_channels=1, force_zeros_for_pooled_projection=False,
                 pos_embed_type=None, use_pos_embed=False)  # fmt: skip
    return randomize(SD3ControlNetModel(**{**small, **config}))


def call_blocks(model: Any, inputs: dict[str, Any]) -> Tensor:
    x = inputs["hidden_states"]
    for block in model.transformer_blocks:
        x = block(x, inputs["temb"])
    return x


def inputs(**more: Any) -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 4, 6, 10),
        encoder_hidden_states=randn(2, 7, 32, seed=2),
        pooled_projections=randn(2, 20, seed=3),
        timestep=torch.tensor([3.0, 987.0]),
        **more,
    )


LARGE: dict[str, Any] = dict(qk_norm="rms_norm")
MEDIUM = dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))
LAYERS = {
    "SD3 joint block": 3,
    "attention (JointAttnProcessor2_0)": 3,
    "feed-forward activation": 5,
    "patch embedding (Conv2d, kernel = stride)": 1,
    "output norm (AdaLayerNormContinuous)": 2,  # and that of the text in the last block
}
NAME = "SD3Transformer2DModel"
MODELS = (
    Model(NAME, "sd3", sd3, inputs, LAYERS),
    Model(f"{NAME}, 3.5 large", "sd3", lambda: sd3(**LARGE), inputs, LAYERS),
    Model(f"{NAME}, 3.5 medium", "sd3", lambda: sd3(**MEDIUM), inputs,
          {**LAYERS, "attention (JointAttnProcessor2_0)": 5}),
    Model("SD3ControlNetModel", "sd3", controlnet, lambda: dict(hidden_states=randn(2, 15, 72), temb=randn(2, 72)),
          {"SD3 single block": 2, "attention (JointAttnProcessor2_0)": 2, "feed-forward activation": 2,
           "patch embedding (Conv2d, kernel = stride)": 1},
          call=call_blocks),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(name: str, heads: int, tokens: int = 1711, text: int = 333, **config) -> Whole:
    width = 64 * heads

    def given(dtype: torch.dtype) -> tuple:
        return *(randn(1, n, width, seed=n).to(dtype) for n in (tokens, text)), randn(1, width).to(dtype)

    return block_row(
        f"{name} block", f"1x{tokens}x{width}, {text} text tokens",
        lambda: sd3(num_layers=2, attention_head_dim=64, num_attention_heads=heads, caption_projection_dim=width,
                    **config), "transformer_blocks.0", given,
    )  # fmt: skip


def controlnet_row(tokens: int = 2048) -> Whole:
    """SD3.5-large's ControlNet, 38 heads of 64, with one of its 19 blocks."""
    return block_row(
        "SD3.5-large ControlNet block", f"1x{tokens}x2432, one block",
        lambda: controlnet(num_layers=1, attention_head_dim=64, num_attention_heads=38), "transformer_blocks.0",
        lambda dtype: (randn(1, tokens, 2432).to(dtype), randn(1, 2432, seed=2).to(dtype)),
    )  # fmt: skip


ROWS = (
    row("SD3.5-large", 38, qk_norm="rms_norm"),
    row("SD3.5-medium", 24, qk_norm="rms_norm", dual_attention_layers=(0,)),
    controlnet_row(),
)
