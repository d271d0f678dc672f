"""diffusers' LTX2VideoTransformer3DModel as LTX-2, as 2.3 (gated heads, text modulation) and as 2.5."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole
from fastdit.testing.zoo import Model, randn, text_mask

LAYERS = {
    "LTX-2 block": 2,
    "attention (LTX2Attention)": 12,
    "feed-forward activation": 4,
    "text padding (a 0/1 mask over the keys)": 1,
    "a timestep per token (LTX-2)": 1,
    "output norm (modulated by the model)": 1,
}
LTX23 = dict(
    gated_attn=True, audio_gated_attn=True, cross_attn_mod=True, audio_cross_attn_mod=True, perturbed_attn=True,
    use_prompt_embeddings=False,
)  # fmt: skip


def ltx2(**config) -> Any:
    """LTX2VideoTransformer3DModel of two narrow layers: video 2 x 22 channels, audio 2 x 10."""
    from diffusers import LTX2VideoTransformer3DModel

    small = dict(
        in_channels=6, out_channels=6, num_attention_heads=2, attention_head_dim=22, cross_attention_dim=44,
        audio_in_channels=5, audio_out_channels=5, audio_num_attention_heads=2, audio_attention_head_dim=10,
        audio_cross_attention_dim=20, num_layers=2, caption_channels=18, rope_type="split",
    )  # fmt: skip
    return randomize(LTX2VideoTransformer3DModel(**{**small, **config}))


def inputs(*, newer: bool = False, **more: Any) -> dict[str, Any]:
    """newer: a timestep per token and a sigma per sample, and text that the connectors have projected already."""
    grid = dict(num_frames=2, height=3, width=5)
    tokens, timestep, mask = math.prod(grid.values()), torch.tensor([3.0, 987.0]), text_mask(7, 3, total=7)
    width, audio_width = (44, 20) if newer else (18, 18)
    sigmas = dict(sigma=timestep + 10, audio_sigma=timestep + 5, use_cross_timestep=True) if newer else {}
    return dict(
        hidden_states=randn(2, tokens, 6),
        audio_hidden_states=randn(2, 9, 5, seed=2),
        encoder_hidden_states=randn(2, 7, width, seed=3),
        audio_encoder_hidden_states=randn(2, 7, audio_width, seed=4),
        timestep=timestep[:, None] * torch.arange(tokens).remainder(2) if newer else timestep,
        audio_timestep=timestep,
        encoder_attention_mask=mask,
        audio_encoder_attention_mask=mask.flip(1),
        audio_num_frames=9,
        **{**grid, **sigmas, **more},
    )


def both(model: Any, given: dict[str, Any]) -> Tensor:
    """Video and audio in one tensor."""
    return torch.cat([t.flatten() for t in model(**given, return_dict=False)])


def entry(name: str, config: dict[str, Any], **options: Any) -> Model:
    times = ("timestep", "audio_timestep", "sigma", "audio_sigma")
    name, fixed = f"LTX2VideoTransformer3DModel{name}", (*times, "perturbation_mask")
    return Model(name, "ltx", lambda: ltx2(**config), lambda: inputs(**options), LAYERS, both, keeps=times, fixed=fixed)


MODELS = (
    entry("", {}),
    entry(", modalities apart, interleaved rotation", dict(rope_type="interleaved"), isolate_modalities=True),
    entry(" as 2.3", LTX23, newer=True),
    entry(" as 2.3, one perturbed block", {**LTX23, "rope_type": "interleaved"}, newer=True,
          spatio_temporal_guidance_blocks=[1], perturbation_mask=torch.tensor([0.0, 1.0])),
    entry(" as 2.5, text modulation without a timestep", {**LTX23, "use_prompt_adaln_single": False}, newer=True),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def ltx2_row(tokens: int = 576, audio_tokens: int = 64, text: int = 1024) -> Whole:
    """A block of LTX-2 19B: video 32 heads of 128, audio 32 heads of 64."""

    def build() -> nn.Module:
        from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock

        return randomize(LTX2VideoTransformerBlock(4096, 32, 128, 4096, 2048, 32, 64, 2048, rope_type="split"))

    def run(dtype: torch.dtype, device: str) -> Run:
        streams = [
            randn(1, n, width, seed=n + width).to(device, dtype)
            for n, width in ((tokens, 4096), (audio_tokens, 2048), (text, 4096), (text, 2048))
        ]
        tembs = [
            randn(1, 1, width, seed=width).to(device, dtype)
            for width in (6 * 4096, 6 * 2048, 4 * 4096, 4 * 2048, 4096, 2048)
        ]
        angles = [
            randn(1, 32, n, half, seed=half).to(device)
            for n, half in ((tokens, 64), (audio_tokens, 32), (tokens, 32), (audio_tokens, 32))
        ]
        rope = [(angle.cos(), angle.sin()) for angle in angles]

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                video, audio = model(*streams, *tembs, None, None, *rope)
                return torch.cat([video.flatten(), audio.flatten()])

        return call

    return Whole(
        "LTX-2 block", f"1x{tokens}x4096 beside 1x{audio_tokens}x2048, one block, {text} text tokens", build, run,
        compile=lambda model: model.compile(dynamic=False),
    )  # fmt: skip


ROWS = (ltx2_row(),)
