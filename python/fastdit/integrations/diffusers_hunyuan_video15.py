"""diffusers' HunyuanVideo15Transformer3DModel: image, ByT5 and text tokens, valid ones first, without a host sync.

Eager takes valid and padded tokens out of each sample by boolean indices, and asks on the host whether there is an
image at all: a dozen stops per sample and step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.integrations.masks import valid_first
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, parameters, unknown


def model_forward(
    self,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Tensor | None = None,
    encoder_attention_mask_2: Tensor | None = None,
    image_embeds: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
):
    glyphs, glyph_mask = encoder_hidden_states_2, encoder_attention_mask_2
    lora_scale = attention_kwargs  # the class sets it around its forward
    if lora_scale or glyphs is None or glyph_mask is None or image_embeds is None:
        return original(
            self,
            hidden_states,
            timestep,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep_r,
            glyphs,
            glyph_mask,
            image_embeds,
            attention_kwargs,
            return_dict,
        )
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    patch = (self.config.patch_size_t, self.config.patch_size, self.config.patch_size)
    t, h, w = (size // p for size, p in zip(hidden_states.shape[2:], patch, strict=True))
    rotary, temb = self.rope(hidden_states), self.time_embed(timestep, timestep_r=timestep_r)
    x = self.x_embedder(hidden_states)
    text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    context, mask = valid_text(self, text, encoder_attention_mask, glyphs, glyph_mask, image_embeds)

    for block in self.transformer_blocks:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            x, context = self._gradient_checkpointing_func(block, x, context, temb, mask, rotary)
        else:
            x, context = block(x, context, temb, mask, rotary)

    tokens = self.proj_out(self.norm_out(x, temb))
    channels = tokens.shape[-1] // (patch[0] * patch[1] * patch[2])
    sample = ops.unpatchify3d(tokens, grid=(t, h, w), patch=patch, channels=channels, order="cthw")
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


model_forward.__name__ = "forward"


def valid_text(
    model: Any, text: Tensor, text_mask: Tensor, glyphs: Tensor, glyph_mask: Tensor, image_embeds: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens (B, L, C) of image, ByT5 and text, valid ones first in this order, and which they are, (B, L) bool.

    An image of zeros is none: its tokens are padding, in the whole batch.
    """
    kinds = model.cond_type_embed(torch.arange(3, device=text.device))
    there = (image_embeds != 0).any()
    image = model.image_embedder(image_embeds)
    tokens = torch.cat([image + kinds[2], model.context_embedder_2(glyphs) + kinds[1], text + kinds[0]], dim=1)
    valid = torch.cat([there.expand(image.shape[:2]), glyph_mask.bool(), text_mask.bool()], dim=1)
    lengths, tokens = valid_first(valid, tokens)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


MODEL = (
    *("x_embedder", "image_embedder", "context_embedder", "context_embedder_2", "time_embed", "cond_type_embed"),
    *("rope", "transformer_blocks", "norm_out", "proj_out"),
)
SIGNATURE = [
    *("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "timestep_r"),
    *("encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds", "attention_kwargs", "return_dict"),
]

register(
    Kind(
        name="HunyuanVideo-1.5 text order and output layout",
        ops=("unpatchify3d",),
        match=lambda m: has(m, *MODEL, "config") and parameters(m) == SIGNATURE,
        refuse=lambda model: unknown(model, *MODEL, "config", "gradient_checkpointing"),
        patches=lambda model: [(model, "forward", model_forward)],
    )
)
