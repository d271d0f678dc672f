"""diffusers' Wan family: text and image to video, a timestep per token, VACE, Animate, ChronoEdit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import diffusers_wan, randomize
from fastdit.testing.whole import Run, Whole, model_row
from fastdit.testing.zoo import Model, randn

I2V = dict(image_dim=20, added_kv_proj_dim=48)
LAYERS = {
    "Wan block": 2,
    "attention (WanAttnProcessor)": 4,
    "patch embedding (Conv3d, kernel = stride)": 1,
    "feed-forward activation": 2,
    "Wan output layer (norm, modulation, unpatchify)": 1,
}
SMALL = dict(num_attention_heads=2, attention_head_dim=24, text_dim=32, freq_dim=16, ffn_dim=96, rope_max_seq_len=32)


def inputs(*, image: bool = False, per_token: bool = False, text: int = 512) -> dict[str, Any]:
    timestep = torch.tensor([3.0, 987.0])
    if per_token:
        timestep = timestep[:, None] * torch.arange(2 * 4 * 6).remainder(2)
    return dict(
        hidden_states=randn(2, 4, 2, 8, 12),
        timestep=timestep,
        encoder_hidden_states=randn(2, text, 32),
        encoder_hidden_states_image=randn(2, 257, 20) if image else None,
    )


def vace(**config) -> Any:
    from diffusers import WanVACETransformer3DModel

    more = dict(in_channels=4, out_channels=4, num_layers=3, vace_layers=[0, 2], vace_in_channels=6)
    return randomize(WanVACETransformer3DModel(**{**SMALL, **more, **config}))


def vace_inputs() -> dict[str, Any]:
    return dict(
        **inputs(text=7),
        control_hidden_states=randn(2, 6, 2, 8, 8, seed=2),  # fewer tokens than the video: the rest is zeros
        control_hidden_states_scale=torch.tensor([0.75, 1.5]),
    )


def animate() -> Any:
    from diffusers import WanAnimateTransformer3DModel

    more = dict(
        in_channels=12, latent_channels=4, out_channels=4, num_layers=2, image_dim=20, added_kv_proj_dim=48,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip
    return randomize(WanAnimateTransformer3DModel(**SMALL, **more))


def animate_inputs() -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 12, 3, 8, 12),
        timestep=torch.tensor([3.0, 987.0]),
        encoder_hidden_states=randn(2, 512, 32),
        encoder_hidden_states_image=randn(2, 257, 20),
        pose_hidden_states=randn(2, 4, 2, 8, 12, seed=2),
        face_pixel_values=randn(2, 3, 5, 16, 16, seed=3),
    )


def chrono_edit() -> Any:
    from diffusers import ChronoEditTransformer3DModel

    return randomize(ChronoEditTransformer3DModel(**SMALL, **I2V, in_channels=4, out_channels=4, num_layers=2))


MODELS = (
    Model("WanTransformer3DModel", "wan", diffusers_wan, inputs, LAYERS),
    Model(
        "WanTransformer3DModel, image to video", "wan", lambda: diffusers_wan(**I2V), lambda: inputs(image=True), LAYERS
    ),
    Model("WanTransformer3DModel, a timestep per token", "wan", diffusers_wan, lambda: inputs(per_token=True), LAYERS),
    Model("WanTransformer3DModel, no cross norm", "wan", lambda: diffusers_wan(cross_attn_norm=False), inputs, LAYERS),
    Model("ChronoEditTransformer3DModel", "wan", chrono_edit, lambda: inputs(image=True), LAYERS),
    Model(
        "WanVACETransformer3DModel",
        "wan",
        vace,
        vace_inputs,
        LAYERS
        | {
            "Wan block": 3,
            "Wan VACE block": 2,
            "attention (WanAttnProcessor)": 10,
            "feed-forward activation": 5,
        },
    ),
    Model(
        "WanAnimateTransformer3DModel",
        "wan",
        animate,
        animate_inputs,
        {name: count for name, count in LAYERS.items() if "output" not in name},
    ),
)


# One block in its whole model, so that what the model makes of the timesteps counts too: 1,920 tokens ----------------
def ti2v(dtype: torch.dtype, device: str) -> Run:
    """Wan 2.2 TI2V conditions on the first frame: its tokens are at timestep 0, all others at t."""
    timestep = torch.full((1, 6 * 16 * 20), 900.0, device=device)
    timestep[:, : 16 * 20] = 0
    video = randn(1, 48, 6, 32, 40).to(device, dtype)
    text = randn(1, 512, 4096).to(device, dtype)

    def call(model: Any) -> Tensor:
        with torch.no_grad():
            return model(video, timestep, text, return_dict=False)[0]

    return call


SIZE_1_3B = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=1, in_channels=16,
                 out_channels=16, text_dim=4096, freq_dim=256, rope_max_seq_len=1024)  # fmt: skip


def vace_row(grid: tuple[int, int, int] = (4, 16, 16)) -> Whole:
    """VACE 1.3B, 12 heads of 128, with one of its 30 blocks and one of its 15 of control."""
    frames, height, width = grid

    def given(dtype: torch.dtype) -> dict[str, Any]:
        size = (frames, 2 * height, 2 * width)
        return dict(
            hidden_states=randn(1, 16, *size).to(dtype),
            timestep=torch.tensor([900.0]),
            encoder_hidden_states=randn(1, 512, 4096, seed=2).to(dtype),
            control_hidden_states=randn(1, 96, *size, seed=3).to(dtype),
        )

    return model_row(
        "Wan2.1-VACE-1.3B blocks", f"1x{math.prod(grid)}x1536, a block and one of control, 512 text tokens",
        lambda: vace(**SIZE_1_3B, vace_layers=[0], vace_in_channels=96), "vace_blocks.0", given,
    )  # fmt: skip


ROWS = (
    Whole(
        "Wan2.2-TI2V-5B, a timestep per token",
        "1x1920x3072, one block, 512 text tokens",
        lambda: diffusers_wan(
            num_attention_heads=24, attention_head_dim=128, ffn_dim=14336, num_layers=1, rope_max_seq_len=1024,
            in_channels=48, out_channels=48, text_dim=4096, freq_dim=256,
        ),
        ti2v,
        compile=lambda model: model.blocks[0].compile(dynamic=False),
    ),
    vace_row(),
)  # fmt: skip
