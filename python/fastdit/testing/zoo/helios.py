"""diffusers' HeliosTransformer3DModel: with and without a history, text for all tokens or for the video's only."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn

LAYERS = {
    "Helios block": 2,
    "attention (WanAttnProcessor)": 4,
    "feed-forward activation": 2,
    "patch embedding (Conv3d, kernel = stride)": 1,
    "output norm (Helios)": 1,
}


def helios(**config) -> Any:
    """HeliosTransformer3DModel of two narrow layers: two heads of 24."""
    from diffusers import HeliosTransformer3DModel

    small = dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=32, freq_dim=16,
                 ffn_dim=96, num_layers=2, rope_dim=(8, 8, 8))  # fmt: skip
    return randomize(HeliosTransformer3DModel(**{**small, **config}))


def inputs(*, history: bool = True) -> dict[str, Any]:
    frames = {"short": 2, "mid": 2, "long": 4}
    before: dict[str, Any] = {}
    for start, (name, n) in enumerate(frames.items()) if history else ():
        before[f"latents_history_{name}"] = randn(2, 4, n, 6, 10, seed=3 + start)
        before[f"indices_latents_history_{name}"] = (torch.arange(n) + 4 * start).expand(2, -1)
    return dict(
        hidden_states=randn(2, 4, 3, 6, 10),
        timestep=torch.tensor([3, 987]),
        encoder_hidden_states=randn(2, 7, 32, seed=2),
        indices_hidden_states=(torch.arange(3) + 12).expand(2, -1),
        **before,
    )


NAME = "HeliosTransformer3DModel"
MODELS = (
    Model(NAME, "wan", helios, inputs, LAYERS),
    Model(f"{NAME}, text for all tokens", "wan",
          lambda: helios(guidance_cross_attn=False, zero_history_timestep=False, cross_attn_norm=False), inputs,
          LAYERS),
    Model(f"{NAME}, amplified history", "wan",
          lambda: helios(is_amplify_history=True, has_multi_term_memory_patch=False),
          lambda: inputs(history=False), LAYERS),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(tokens: int = 768, history: int = 256, text: int = 226, width: int = 5120) -> Whole:
    """Helios 14B, 40 heads of 128, with one of its 40 blocks; history at timestep 0."""

    def given(dtype: torch.dtype) -> tuple:
        x, context = randn(1, history + tokens, width).to(dtype), randn(1, text, width, seed=2).to(dtype)
        temb = randn(1, 2, 6, width, seed=3).repeat_interleave(torch.tensor([history, tokens]), dim=1)
        angles = randn(1, history + tokens, 64).repeat_interleave(2, dim=2)
        return x, context, temb.to(dtype), torch.cat([angles.cos(), angles.sin()], dim=2), tokens

    return block_row(
        "Helios block", f"1x{history}+{tokens}x{width}, one block, {text} text tokens",
        lambda: helios(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=1,
                       rope_dim=(44, 42, 42)),
        "blocks.0", given,
    )  # fmt: skip


ROWS = (row(),)
