"""diffusers' PixArtTransformer2DModel (alpha with sizes as conditions, Sigma) and LatteTransformer3DModel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole
from fastdit.testing.zoo import Model, randn, text_mask

LAYERS = {
    "adaLN-single block": 2,
    "attention (AttnProcessor2_0)": 4,
    "feed-forward activation": 2,
    "patch embedding (Conv2d, kernel = stride)": 1,
    "text padding (a 0/1 mask over the keys)": 1,
    "output norm (modulated by the model)": 1,
}
LATTE = {
    "adaLN-single block": 4,
    "attention (AttnProcessor2_0)": 6,
    "feed-forward activation": 4,
    "patch embedding (Conv2d, kernel = stride)": 1,
    "output norm (modulated by the model)": 1,
}
SMALL = dict(num_attention_heads=3, attention_head_dim=20, cross_attention_dim=60, num_layers=2)
NAME = "PixArtTransformer2DModel"


def pixart(**config) -> Any:
    """PixArtTransformer2DModel; sample_size 128 is alpha at 1024 x 1024, which knows the picture's size."""
    from diffusers import PixArtTransformer2DModel

    return randomize(PixArtTransformer2DModel(**{**SMALL, "sample_size": 10, "caption_channels": 16, **config}))


def latte() -> Any:
    """LatteTransformer3DModel as released: no affine norms, tanh GELU."""
    from diffusers import LatteTransformer3DModel

    return randomize(
        LatteTransformer3DModel(
            **SMALL, sample_size=8, caption_channels=16, in_channels=4, out_channels=8, patch_size=2, video_length=3,
            activation_fn="gelu-approximate", attention_bias=True, norm_elementwise_affine=False, norm_eps=1e-6,
            norm_type="ada_norm_single",
        )
    )  # fmt: skip


def inputs(*, sizes: bool = False, **masks: Tensor) -> dict[str, Any]:
    conditions = dict(resolution=torch.tensor([[512.0, 384.0]] * 2), aspect_ratio=torch.tensor([[0.75]] * 2))
    return dict(
        hidden_states=randn(2, 4, 6, 10),
        encoder_hidden_states=randn(2, 7, 16, seed=2),
        timestep=torch.tensor([3, 987]),
        added_cond_kwargs=conditions if sizes else dict(resolution=None, aspect_ratio=None),
        **{"encoder_attention_mask": text_mask(7, 3, total=7), **masks},
    )


def latte_inputs() -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 4, 3, 8, 8),
        encoder_hidden_states=randn(2, 7, 16, seed=2),
        timestep=torch.tensor([3, 987]),
    )


MODELS = (
    Model(f"{NAME}, alpha", "pixart", lambda: pixart(use_additional_conditions=True), lambda: inputs(sizes=True),
          LAYERS, keeps=("timestep", "added_cond_kwargs")),
    Model(f"{NAME}, Sigma", "pixart", pixart, inputs, LAYERS),
    Model(f"{NAME}, both masks", "pixart", pixart,
          lambda: inputs(attention_mask=text_mask(15, 9, total=15), encoder_attention_mask=text_mask(0, 4, total=7)),
          LAYERS),
    Model("LatteTransformer3DModel", "pixart", latte, latte_inputs, LATTE),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def pixart_row(size: int = 96, text: int = 300, valid: int = 60) -> Whole:
    """PixArt-Sigma, 16 heads of 72, with one of its 28 blocks; a latent of size x size."""
    tokens = (size // 2) ** 2

    def build() -> nn.Module:
        return pixart(num_attention_heads=16, attention_head_dim=72, cross_attention_dim=1152, caption_channels=4096,
                      num_layers=1, sample_size=size, use_additional_conditions=False)  # fmt: skip

    def run(dtype: torch.dtype, device: str) -> Run:
        x, context = randn(1, 4, size, size).to(device, dtype), randn(1, text, 4096, seed=2).to(device, dtype)
        timestep, mask = torch.tensor([500], device=device), text_mask(valid, total=text).to(device)
        conditions = dict(resolution=None, aspect_ratio=None)

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return model(x, encoder_hidden_states=context, timestep=timestep, added_cond_kwargs=conditions,
                             encoder_attention_mask=mask, return_dict=False)[0]  # fmt: skip

        return call

    return Whole(
        "PixArt-Sigma block", f"1x{tokens}x1152, one block, {valid} of {text} text tokens", build, run,
        compile=lambda model: model.transformer_blocks[0].compile(dynamic=False),
    )  # fmt: skip


ROWS = (pixart_row(),)
