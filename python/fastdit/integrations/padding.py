"""Text padding as key lengths: a 0/1 mask over the keys of cross-attention becomes one count per sample.

Cross-attention is blind to the order of its keys where these have no positions. So a model that is given a mask puts
the valid tokens in front, once per call and on the device, and its blocks get `lengths` in the place of a bias: exact
for every 0/1 mask, whatever its pattern, and the identity for the masks that tokenizers make.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fastdit.integrations.diffusers_processor import Processor
from fastdit.integrations.masks import valid_first
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, unknown


def is_mask(mask: Tensor, states: Tensor) -> bool:
    """A 0/1 mask by its type: floats may hold weights, and 3-D tensors are biases already."""
    return not mask.is_floating_point() and states.ndim == 3 and mask.shape == states.shape[:2]


def is_lengths(mask: Any) -> bool:
    """Did `model_forward` make what an attention is given as its mask?"""
    return isinstance(mask, Tensor) and mask.ndim == 1 and mask.dtype == torch.int32


# What a model is given: tokens, their mask, and the attention of each block that reads them.
STREAMS = (
    ("encoder_hidden_states", "encoder_attention_mask", "attn2"),
    ("audio_encoder_hidden_states", "audio_encoder_attention_mask", "audio_attn2"),
)


def model_forward(self, *args, **kwargs):
    """Masks and tokens that come by keyword, as pipelines give them; any others go the original's way."""
    for states, mask, attention in STREAMS:
        tokens, bits = kwargs.get(states), kwargs.get(mask)
        if tokens is not None and bits is not None and is_mask(bits, tokens):
            if all(isinstance(getattr(block, attention).processor, Processor) for block in self.transformer_blocks):
                lengths, kwargs[states] = valid_first(bits, tokens)
                kwargs[mask] = torch.where(lengths == 0, bits.shape[1], lengths)  # a constant bias changes no softmax
    return original(self, *args, **kwargs)


model_forward.__name__ = "forward"

BIAS = -10000.0
MODEL = (
    *("pos_embed", "rope", "proj_in", "transformer_blocks", "norm_out", "scale_shift_table", "proj_out"),
    *("patch_embed", "patch_embedding", "time_embed", "adaln_single", "caption_projection", "caption_norm"),
    *("gradient_checkpointing", "use_additional_conditions", "out_channels"),
    *("audio_rope", "audio_proj_in", "audio_norm_out", "audio_scale_shift_table", "audio_proj_out", "audio_time_embed"),
    *("audio_caption_projection", "cross_attn_rope", "cross_attn_audio_rope"),
    *("av_cross_attn_video_scale_shift", "av_cross_attn_audio_scale_shift"),
    *("av_cross_attn_video_a2v_gate", "av_cross_attn_audio_v2a_gate"),
    *("prompt_modulation", "prompt_adaln", "audio_prompt_adaln", "keyframes_abs_pos_embedding"),
)


def matches_model(module: Any) -> bool:
    """Its forward makes a bias of a 2-D mask and hands any other to its blocks, which give it to `attention` alone."""
    if not has(module, "transformer_blocks", "scale_shift_table", "proj_out"):
        return False
    forward = inspect.unwrap(type(module).forward)
    taken = inspect.signature(forward).parameters
    readers = ["attn1", *(attention for _, mask, attention in STREAMS if mask in taken)]
    return (
        "encoder_attention_mask" in taken
        and BIAS in forward.__code__.co_consts
        and all(has(getattr(b, name, None), "processor") for b in module.transformer_blocks for name in readers)
        and all(has(block, "scale_shift_table") for block in module.transformer_blocks)
    )


register(
    Kind(
        name="text padding (a 0/1 mask over the keys)",
        ops=("attention",),
        match=matches_model,
        refuse=lambda model: unknown(model, *MODEL),
        patches=lambda model: [(model, "forward", model_forward)],
    )
)
