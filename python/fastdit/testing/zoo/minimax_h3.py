"""diffusers' MiniMaxH3Transformer3DModel (text, video and audio in one sequence) and AutoencoderKLMiniMaxH3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, call_decode, call_encode, randn
from fastdit.testing.zoo.vae_hunyuan import around_one

LAYERS = {
    "MiniMax-H3 block": 2,
    "MiniMax-H3 text block": 1,
    "attention (MiniMaxH3AttnProcessor)": 3,
    "feed-forward activation": 3,
    "output norm (MiniMax-H3)": 1,
}
VAE_LAYERS = {
    "MiniMax-H3 residual block (GroupNorm of frames, SiLU, conv, twice)": 3,
    "MiniMax-H3 downsampling (strided convolution)": 2,
    "MiniMax-H3 encoder (first and last convolution)": 1,
    "MiniMax-H3 decoder block": 2,
    "attention (MiniMaxH3VideoAttnProcessor)": 2,
    "feed-forward activation": 2,
}


def minimax_h3(**config: Any) -> Any:
    """MiniMaxH3Transformer3DModel of two narrow layers: two heads of 28, wider together than the stream."""
    from diffusers import MiniMaxH3Transformer3DModel

    small = dict(num_attention_heads=2, attention_head_dim=28, hidden_size=40, num_layers=2, num_refiner_layers=1,
                 ffn_dim=72, in_channels=3, audio_in_channels=5, text_dim=20, freq_dim=16, time_embed_hidden_dim=24,
                 time_embed_dim=18, rope_freq_dim=4)  # fmt: skip
    return randomize(MiniMaxH3Transformer3DModel(**{**small, **config}))


def inputs() -> dict[str, Any]:
    """Five tokens of text, two of a condition, then video and audio in turns; three timesteps."""
    tags = torch.tensor([1] * 5 + [0] * 2 + [0, 2, 0] * 4)
    steps = torch.where(tags == 1, 2, tags // 2)
    steps[5:7] = 2
    return dict(
        hidden_states=randn(2, 10, 12),
        audio_hidden_states=randn(2, 4, 5, seed=2),
        encoder_hidden_states=randn(2, 5, 20, seed=3),
        timestep=torch.tensor([0.25, 0.75, 1.0]),
        timestep_indices=steps,
        token_tags=tags,
        position_ids=torch.arange(19)[:, None] * torch.tensor([1, 3, 2]) % 7,
        video_indices=(tags == 0).nonzero().flatten(),
        audio_indices=(tags == 2).nonzero().flatten(),
        text_indices=(tags == 1).nonzero().flatten(),
    )


def call(model: Any, inputs: dict[str, Any]) -> Tensor:
    return torch.cat([output.flatten(1) for output in model(**inputs, return_dict=False)], dim=1)


def minimax_h3_vae(**config: Any) -> Any:
    """AutoencoderKLMiniMaxH3: 4 x 4 pixels of four frames, clips of 17 frames as released; a narrow decoder."""
    from diffusers import AutoencoderKLMiniMaxH3

    small = dict(latent_channels=3, block_out_channels=(8, 12, 16), layers_per_block=1,
                 spatial_downsample_factors=(2, 2, 1), temporal_downsample_factors=(2, 2, 1), norm_num_groups=4,
                 decoder_num_layers=2, decoder_num_attention_heads=2, decoder_attention_head_dim=16,
                 decoder_num_register_tokens=2, decoder_ffn_mult=2)  # fmt: skip
    return around_one(randomize(AutoencoderKLMiniMaxH3(**{**small, **config})))


def tiled() -> Any:
    model = minimax_h3_vae()
    model.enable_tiling(16, 16, 8, 8)
    return model


PAGE, VAE = "minimax_h3", "AutoencoderKLMiniMaxH3"
MODELS = (
    Model("MiniMaxH3Transformer3DModel", PAGE, minimax_h3, inputs, LAYERS, call),
    Model(f"{VAE} encode", PAGE, minimax_h3_vae, lambda: dict(x=randn(1, 3, 22, 16, 20)), VAE_LAYERS, call_encode),
    Model(f"{VAE} decode", PAGE, minimax_h3_vae, lambda: dict(z=randn(2, 3, 7, 3, 4)), VAE_LAYERS, call_decode),
    Model(f"{VAE} decode, in tiles", PAGE, tiled, lambda: dict(z=randn(1, 3, 7, 5, 4)), VAE_LAYERS, call_decode),
)


# ---- at full width ------------------------------------------------------------------------------------------


def tables(rows: int, width: int) -> tuple[Tensor, Tensor]:
    angles = randn(rows, width // 2, seed=4).repeat(1, 2)
    return angles.cos(), angles.sin()


def row(tokens: int = 512) -> Whole:
    """56 heads of 128 over a stream of 5376, with one of its 50 blocks; two timesteps."""

    def given(dtype: torch.dtype) -> tuple:
        index = torch.arange(tokens) % 6
        return randn(1, tokens, 5376).to(dtype), randn(2, 2688, seed=2), index, tables(tokens, 96)

    return block_row(
        "MiniMax-H3 block", f"1x{tokens}x5376, one block",
        lambda: minimax_h3(num_layers=1, num_refiner_layers=0, num_attention_heads=56, attention_head_dim=128,
                           hidden_size=5376, ffn_dim=14336, time_embed_dim=2688, rope_freq_dim=16),
        "transformer_blocks.0", given,
    )  # fmt: skip


def vae_row(tokens: int = 1285) -> Whole:
    """32 heads of 64 over a tile of 16 x 16 latents of 5 frames, with one of its 36 blocks; the stream is fp32."""

    def given(dtype: torch.dtype) -> tuple:
        cos, sin = tables(tokens, 48)
        return randn(1, tokens, 2048), (cos[None, :, None], sin[None, :, None])

    return block_row(
        "MiniMax-H3 VAE decoder block", f"1x{tokens}x2048, one block",
        lambda: minimax_h3_vae(decoder_num_layers=1, decoder_num_attention_heads=32, decoder_attention_head_dim=64,
                               decoder_ffn_mult=4),
        "decoder.transformer_blocks.0", given,
    )  # fmt: skip


ROWS = (row(), vae_row())
