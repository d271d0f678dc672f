"""diffusers' Cosmos3OmniTransformer: video; sound too, with Nemotron's text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import block_row
from fastdit.testing.zoo import Model, randn

NEMOTRON = dict(hidden_act="relu2", qk_norm_for_text=False, use_und_k_norm_for_gen=True)
SOUND = dict(sound_gen=True, sound_dim=6)


def cosmos3(**config) -> Any:
    """Two narrow layers: four heads of 20 over two of keys and values, wider together than the stream."""
    from diffusers import Cosmos3OmniTransformer

    small = dict(head_dim=20, hidden_size=48, intermediate_size=56, latent_channel=3, num_attention_heads=4,
                 num_hidden_layers=2, num_key_value_heads=2, patch_latent_dim=12, vocab_size=30,
                 rope_axes_dim=(4, 3, 3), rope_theta=100.0)  # fmt: skip
    return randomize(Cosmos3OmniTransformer(**{**small, **config}))


def inputs(sound: bool = False, text: int = 5) -> dict[str, Any]:
    """Text, three frames of 2 x 3 patches, the first of which is given, and four steps of sound."""
    video, steps = 18, 4 if sound else 0
    end, total = text + video, text + video + steps
    given = dict(
        input_ids=torch.arange(text) * 7 % 30,
        text_indexes=torch.arange(text),
        position_ids=torch.arange(total) * torch.tensor([[1], [3], [2]]) % 11,
        und_len=text,
        sequence_length=total,
        vision_tokens=[randn(1, 3, 3, 4, 6)],
        vision_token_shapes=[(3, 2, 3)],
        vision_sequence_indexes=torch.arange(text, end),
        vision_mse_loss_indexes=torch.arange(text + 6, end),
        vision_timesteps=torch.full((12,), 730.0),
        vision_noisy_frame_indexes=[torch.tensor([1, 2])],
    )
    if sound:
        given |= dict(
            sound_tokens=[randn(6, steps, seed=2)],
            sound_token_shapes=[(steps, 1, 1)],
            sound_sequence_indexes=torch.arange(end, total),
            sound_mse_loss_indexes=torch.arange(end, total),
            sound_timesteps=torch.full((steps,), 730.0),
            sound_noisy_frame_indexes=[torch.arange(steps)],
        )
    return given


def call(model: Any, inputs: dict[str, Any]) -> Tensor:
    video, sound, _ = model(**inputs, return_dict=False)
    return torch.cat([prediction.flatten() for prediction in [*video, *(sound or ())]])


LAYERS = {
    "Cosmos 3 layer": 2,
    "attention (Cosmos3AttnProcessor)": 2,
    "feed-forward (SwiGLU of three linear layers)": 4,
}
NEMOTRON_LAYERS = {layer: n for layer, n in LAYERS.items() if "SwiGLU" not in layer}
NAME, TIMES = "Cosmos3OmniTransformer", ("vision_timesteps", "sound_timesteps")
MODELS = (
    Model(NAME, "cosmos", cosmos3, inputs, LAYERS, call, keeps=TIMES, fixed=TIMES),
    Model(f"{NAME}, Nemotron's text, sound", "cosmos", lambda: cosmos3(**NEMOTRON, **SOUND),
          lambda: inputs(sound=True), NEMOTRON_LAYERS, call, keeps=TIMES, fixed=TIMES),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def layer_inputs(dtype: torch.dtype, text: int = 128, tokens: int = 1024) -> tuple:
    streams = (randn(n, 4096, seed=n).to(dtype) for n in (text, tokens))
    angles = [randn(n, 64).repeat(1, 2) for n in (text, tokens)]
    return *streams, tuple(f(a).to(dtype) for a in angles for f in (torch.cos, torch.sin))


ROWS = (
    block_row(
        "Cosmos 3 layer", "1024x4096, 128 text tokens",
        lambda: cosmos3(num_hidden_layers=1, head_dim=128, hidden_size=4096, intermediate_size=12288,
                        num_attention_heads=32, num_key_value_heads=8, rope_axes_dim=(24, 20, 20)),
        "layers.0", layer_inputs,
    ),
)  # fmt: skip
