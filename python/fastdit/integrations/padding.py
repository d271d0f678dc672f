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
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, unknown


def valid_first(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, C) and a 0/1 mask (B, L) -> the same rows, valid ones first, and their number (B,) int32.

    A sample without any valid token keeps all of them: a constant bias changes no softmax.
    """
    valid = mask.bool()
    order = valid.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    count = valid.sum(1, dtype=torch.int32)
    lengths = torch.where(count == 0, mask.shape[1], count).to(torch.int32)
    return states.gather(1, order.unsqueeze(-1).expand_as(states)), lengths


def is_mask(mask: Tensor, states: Tensor) -> bool:
    """A 0/1 mask by its type: floats may hold weights, and 3-D tensors are biases already."""
    return not mask.is_floating_point() and states.ndim == 3 and mask.shape == states.shape[:2]


def is_lengths(mask: Any) -> bool:
    """Did `valid_first` make what an attention is given as its mask?"""
    return isinstance(mask, Tensor) and mask.ndim == 1 and mask.dtype == torch.int32


def model_forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args, **kwargs):
    mask = kwargs.get("encoder_attention_mask")
    if mask is not None and encoder_hidden_states is not None and is_mask(mask, encoder_hidden_states):
        if all(isinstance(block.attn2.processor, Processor) for block in self.transformer_blocks):
            encoder_hidden_states, kwargs["encoder_attention_mask"] = valid_first(encoder_hidden_states, mask)
    return type(self).forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)


model_forward.__name__ = "forward"

BIAS = -10000.0
MODEL = (
    *("pos_embed", "rope", "proj_in", "transformer_blocks", "norm_out", "scale_shift_table", "proj_out"),
    *("time_embed", "adaln_single", "caption_projection"),
    *("gradient_checkpointing", "use_additional_conditions", "out_channels"),
)


def matches_model(module: Any) -> bool:
    """Its forward makes a bias of a 2-D mask and hands any other to its blocks, which give it to attn2 alone."""
    if not has(module, "transformer_blocks", "caption_projection", "scale_shift_table"):
        return False
    forward = inspect.unwrap(type(module).forward)
    taken = list(inspect.signature(forward).parameters)
    return (
        taken[1:3] == ["hidden_states", "encoder_hidden_states"]
        and "encoder_attention_mask" in taken
        and BIAS in forward.__code__.co_consts
        and all(has(block, "attn1", "attn2", "scale_shift_table") for block in module.transformer_blocks)
        and all(has(block.attn2, "processor") for block in module.transformer_blocks)
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
