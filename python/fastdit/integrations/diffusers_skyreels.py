"""diffusers' SkyReelsV2Transformer3DModel: Wan's block, with a timestep per frame and frame-causal attention.

Diffusion forcing gives every latent frame a timestep of its own; the original repeats their modulation for all tokens
of a frame, here it stays a row per frame. With `num_frame_per_block` > 1 tokens see no later block of frames: that is
`frame_tokens` of `ops.attention`, and no N x N mask is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.integrations.diffusers_lora import lora_scaled
from fastdit.integrations.diffusers_processor import Processor
from fastdit.integrations.diffusers_wan import PROCESSORS, attend, register_block, run_block
from fastdit.integrations.diffusers_wan_model import caller, embedded, output, register_model
from fastdit.integrations.wan_block import Rows, per_block

# Attention --------------------------------------------------------------------------------------------------------


class FrameCausal(NamedTuple):
    """A token sees the tokens of its own group of `frame_tokens` consecutive ones, and of all before it."""

    frame_tokens: int

    def dense(self, x: Tensor) -> Tensor:
        """(1, 1, N, N), True where a query sees a key."""
        group = torch.arange(x.shape[1], device=x.device) // self.frame_tokens
        return (group <= group[:, None])[None, None]


class FastditSkyReelsAttnProcessor(Processor):
    """SkyReelsV2AttnProcessor with `qk_norm_rope` and `attention`; masks that may be anything go to the original."""

    def __init__(self):
        from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor

        super().__init__(SkyReelsV2AttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | FrameCausal | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if isinstance(attention_mask, Tensor) or hidden_states.ndim != 3:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        frame_tokens = None if attention_mask is None else attention_mask.frame_tokens
        return attend(attn, hidden_states, encoder_hidden_states, rotary_emb, frame_tokens=frame_tokens)


PROCESSORS["SkyReelsV2AttnProcessor"] = FastditSkyReelsAttnProcessor


def takes_frames(block: Any) -> bool:
    processor = block.attn1.processor
    return isinstance(processor, FastditSkyReelsAttnProcessor) and processor.replaced


# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor | Rows,
    rotary_emb: tuple[Tensor, Tensor],
    attention_mask: Tensor | FrameCausal | None,
) -> Tensor:
    if isinstance(temb, Tensor) and temb.ndim == 4:
        temb = temb.transpose(1, 2)  # the original's (B, 6, N, C)
    return run_block(self, hidden_states, encoder_hidden_states, temb, rotary_emb, attention_mask)


block_forward.__name__ = "forward"

register_block(
    "SkyReels-V2 block",
    block_forward,
    ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb", "attention_mask"),
)


# The model --------------------------------------------------------------------------------------------------------


@lora_scaled
def model_forward(
    self,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    enable_diffusion_forcing: bool = False,
    fps: Any = None,
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
):
    rotary_emb = self.rope(hidden_states)
    x = embedded(self.patch_embedding, hidden_states)
    temb, projected, text, image = self.condition_embedder(timestep, encoder_hidden_states, encoder_hidden_states_image)
    projected = projected.unflatten(-1, (6, -1))  # (B, 6, C), or (B, F, 6, C) with a timestep per frame
    context = text if image is None else torch.cat([image, text], dim=1)
    if self.config.inject_sample_info:
        rate = torch.tensor(fps, dtype=torch.long, device=x.device)
        rate = self.fps_projection(self.fps_embedding(rate)).unflatten(1, (6, -1))
        projected = projected + (rate.repeat(timestep.shape[1], 1, 1) if enable_diffusion_forcing else rate)
    if enable_diffusion_forcing:
        temb, projected = Rows(temb.unsqueeze(-2)), Rows(projected)

    causal, mask = None, None
    if self.config.num_frame_per_block > 1:
        frames = hidden_states.shape[2] // self.config.patch_size[0]
        causal = FrameCausal(x.shape[1] // frames * self.config.num_frame_per_block)
        if not all(takes_frames(block) for block in self.blocks):
            mask = causal.dense(x)
    call, tokens = caller(self), x.shape[1]
    for block, rows in per_block(self.blocks, projected, lambda few: few.dense(tokens).transpose(1, 2).contiguous()):
        x = call(block, x, context, rows, rotary_emb, causal if takes_frames(block) else mask)
    return output(self, x, temb, hidden_states, return_dict)


register_model(model_forward, optional=("fps_embedding", "fps_projection"))
