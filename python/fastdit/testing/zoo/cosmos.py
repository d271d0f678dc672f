"""diffusers' CosmosTransformer3DModel: learned positions, a timestep per frame, an image beside the text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole
from fastdit.testing.zoo import Model, randn

LAYERS = {
    "Cosmos block": 2,
    "attention (CosmosAttnProcessor)": 4,
    "feed-forward activation": 2,
    "output norm (CosmosAdaLayerNorm)": 1,
    "a timestep per frame (Cosmos)": 1,
}


def cosmos(**config) -> Any:
    """CosmosTransformer3DModel of two narrow layers, without the padding mask that needs torchvision."""
    from diffusers import CosmosTransformer3DModel

    small = dict(in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=20, num_layers=2,
                 text_embed_dim=28, adaln_lora_dim=8, max_size=(8, 16, 16), concat_padding_mask=False)  # fmt: skip
    return randomize(CosmosTransformer3DModel(**{**small, **config}))


def inputs(*, per_frame: bool = False, image: bool = False, **more: Any) -> dict[str, Any]:
    text = randn(2, 7, 28, seed=2)
    frames = torch.tensor([[3.0, 987.0, 40.0], [5.0, 5.0, 900.0]])
    return dict(
        hidden_states=randn(2, 4, 3, 6, 10),
        timestep=frames[:, None, :, None, None] if per_frame else torch.tensor([3.0, 987.0]),
        encoder_hidden_states=(text, randn(2, 5, 12, seed=4)) if image else text,
        fps=16,
        **more,
    )


NAME = "CosmosTransformer3DModel"
IMAGE = dict(img_context_dim_in=12, img_context_dim_out=60)
MODELS = (
    Model(NAME, "cosmos", cosmos, inputs, LAYERS),
    Model(f"{NAME}, a timestep per frame", "cosmos", lambda: cosmos(extra_pos_embed_type=None),
          lambda: inputs(per_frame=True), LAYERS),
    Model(f"{NAME}, text and image", "cosmos", lambda: cosmos(**IMAGE, use_crossattn_projection=True,
          crossattn_proj_in_channels=28, encoder_hidden_states_channels=28), lambda: inputs(image=True), LAYERS),
    Model(f"{NAME}, control residuals and a text mask", "cosmos", lambda: cosmos(controlnet_block_every_n=1),
          lambda: inputs(block_controlnet_hidden_states=[randn(2, 45, 60, seed=5), randn(2, 45, 60, seed=6)],
                         attention_mask=torch.arange(7).lt(4).expand(2, 7)), LAYERS),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def cosmos_row(grid: tuple[int, int, int] = (8, 16, 16), text: int = 512) -> Whole:
    """Cosmos-Predict2 2B, 16 heads of 128, with one of its 28 blocks; a timestep per frame, as video to world has."""
    tokens = math.prod(grid)

    def build() -> nn.Module:
        return cosmos(in_channels=17, out_channels=16, num_attention_heads=16, attention_head_dim=128, num_layers=1,
                      text_embed_dim=1024, adaln_lora_dim=256, max_size=(128, 240, 240),
                      extra_pos_embed_type=None)  # fmt: skip

    def run(dtype: torch.dtype, device: str) -> Run:
        x = randn(1, 17, grid[0], 2 * grid[1], 2 * grid[2]).to(device, dtype)
        context = randn(1, text, 1024, seed=2).to(device, dtype)
        timestep = torch.linspace(0.1, 0.9, grid[0], device=device).view(1, 1, grid[0], 1, 1)

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return model(x, timestep, context, fps=16, return_dict=False)[0]

        return call

    return Whole(
        "Cosmos-Predict2 block", f"1x{tokens}x2048, one block, a timestep per frame", build, run,
        compile=lambda model: model.transformer_blocks[0].compile(dynamic=False),
    )  # fmt: skip


ROWS = (cosmos_row(),)
