"""The forward of diffusers' WanTransformer3DModel and WanVACETransformer3DModel: few rows of modulation, output layer.

Wan 2.2 TI2V gives every token a timestep, of which only one or two differ. The original embeds each (B, N, 6, C);
here each different one is embedded once and the blocks get the row of each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_lora import lora_scaled
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown
from fastdit.integrations.wan_block import Rows, distinct, per_block

# What the models have in common -----------------------------------------------------------------------------------


def embedded(conv: nn.Module, video: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, N, D), contiguous."""
    return conv(video).flatten(2).transpose(1, 2).contiguous()


def caller(model: Any) -> Callable:
    """How the model calls its blocks: under gradient checkpointing or plainly."""
    if torch.is_grad_enabled() and model.gradient_checkpointing:
        return model._gradient_checkpointing_func
    return lambda block, *args: block(*args)


def output(model: Any, x: Tensor, temb: Tensor | Rows, video: Tensor, return_dict: bool):
    """norm_out, modulation by (1, 2, C) + temb (B, C), (B, N, C) or rows (R, 1, C), proj_out, unpatchify."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    table, index = temb if isinstance(temb, Rows) else (temb.unsqueeze(-2), None)
    shift, scale = (model.scale_shift_table.to(table.device) + table).to(x.device).unbind(dim=-2)
    precision = law(model, x, shift)
    h = ops.norm_modulate(x, shift=shift, scale=scale, eps=model.norm_out.eps, row_index=index, precision=precision)
    patch = model.config.patch_size
    sample = ops.unpatchify3d(
        model.proj_out(h),
        grid=tuple(size // p for size, p in zip(video.shape[2:], patch, strict=True)),
        patch=patch,
        channels=model.config.out_channels or model.config.in_channels,
        order="thwc",
    )
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def conditions(
    model: Any, timestep: Tensor, text: Tensor, image: Tensor | None
) -> tuple[Tensor | Rows, Tensor | Rows, Tensor]:
    """temb of the output layer, temb of the blocks, and the tokens of image and text."""
    index, per_sample = None, None
    if timestep.ndim == 2:
        few = distinct(timestep)
        if few is not None:
            timestep, index = few
        else:
            per_sample, timestep = timestep.shape[1], timestep.flatten()
    options = {} if per_sample is None else {"timestep_seq_len": per_sample}
    temb, projected, text, image = model.condition_embedder(timestep, text, image, **options)
    projected = projected.unflatten(-1, (6, -1))
    context = text if image is None else torch.cat([image, text], dim=1)
    if index is None:
        return temb, projected, context
    return Rows(temb.unsqueeze(-2), index), Rows(projected, index), context


# Wan --------------------------------------------------------------------------------------------------------------


@lora_scaled
def model_forward(
    self,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
):
    rotary_emb = self.rope(hidden_states)
    x = embedded(self.patch_embedding, hidden_states)
    temb, projected, context = conditions(self, timestep, encoder_hidden_states, encoder_hidden_states_image)
    call, tokens = caller(self), x.shape[1]
    for block, rows in per_block(self.blocks, projected, lambda few: few.dense(tokens)):
        x = call(block, x, context, rows, rotary_emb)
    return output(self, x, temb, hidden_states, return_dict)


# VACE: a second stack of blocks over the control video, whose outputs are added to those of the first -----------------


@lora_scaled
def vace_forward(
    self,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    control_hidden_states: Any = None,
    control_hidden_states_scale: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
):
    layers = self.config.vace_layers
    if control_hidden_states_scale is None:
        control_hidden_states_scale = control_hidden_states.new_ones(len(layers))
    if len(control_hidden_states_scale) != len(layers):
        raise ValueError(
            f"control_hidden_states_scale: one factor per VACE layer; got {len(control_hidden_states_scale)}, "
            f"expected {len(layers)}; see config.vace_layers."
        )
    rotary_emb = self.rope(hidden_states)
    x = embedded(self.patch_embedding, hidden_states)
    control = embedded(self.vace_patch_embedding, control_hidden_states)
    control = nn.functional.pad(control, (0, 0, 0, x.shape[1] - control.shape[1]))
    # a timestep per sample: per token neither the original nor its VACE blocks know
    temb, projected, text, image = self.condition_embedder(timestep, encoder_hidden_states, encoder_hidden_states_image)
    projected = projected.unflatten(1, (6, -1))
    context = text if image is None else torch.cat([image, text], dim=1)

    call, hints = caller(self), []
    for block, scale in zip(self.vace_blocks, control_hidden_states_scale, strict=True):
        hint, control = call(block, x, context, control, projected, rotary_emb)
        hints.append((hint, scale))
    for i, block in enumerate(self.blocks):
        x = call(block, x, context, projected, rotary_emb)
        if i in layers:
            hint, scale = hints.pop(0)
            x = x + hint.to(x.device) * scale
    return output(self, x, temb, hidden_states, return_dict)


# Recognition ------------------------------------------------------------------------------------------------------

PARTS = ("rope", "patch_embedding", "condition_embedder", "blocks", "norm_out", "proj_out", "scale_shift_table")


def refuse_model(model: Any, *more: str) -> str | None:
    norm = model.norm_out
    if not isinstance(norm, nn.LayerNorm) or norm.elementwise_affine:
        return f"its last norm is a {type(norm).__name__}, not a plain LayerNorm"
    if model.scale_shift_table.ndim != 3 or model.scale_shift_table.shape[1] != 2:
        return "its table of modulation is not (1, 2, C)"
    return unknown(model, *PARTS, *more, "gradient_checkpointing")


def register_model(forward: Callable, *more: str, optional: tuple[str, ...] = ()) -> None:
    """`more`: children that this model has besides Wan's; `optional`: that it may have."""
    taken = list(inspect.signature(forward).parameters)[1:]
    register(
        Kind(
            name="Wan output layer (norm, modulation, unpatchify)",
            ops=("norm_modulate", "unpatchify3d"),
            match=lambda m: has(m, *PARTS, *more) and parameters(m) == taken,
            refuse=lambda m: refuse_model(m, *more, *optional),
            patches=lambda m: [(m, "forward", forward)],
            absorbs=lambda m: [m.norm_out],
            # passes over (tokens, C): cast 3, norm 4, scale 4, shift 4, cast 3 against 2
            saving=lambda m: 16 * m.scale_shift_table.shape[-1] * itemsize(m),
            precision="fp32",
        )
    )


register_model(model_forward)
register_model(vace_forward, "vace_patch_embedding", "vace_blocks")
