"""diffusers' AutoencoderKLHunyuanVideo: residual blocks, mid block, resampling, the ends of encoder and decoder.

Convolutions repeat the border in space and the first frame in time; nothing is carried between calls. The residual
block and the convolution also serve AutoencoderKLHunyuanVideo15 and AutoencoderKLHunyuanImageRefiner.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastdit.integrations.diffusers_processor import Processor, queries_keys_values, refuse_processor, shared
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, refuse_activation, refuse_norms, unknown
from fastdit.integrations.vae_layers import (
    checkpointed,
    conv_forward,
    frame_causal_attention,
    group_norm,
    is_padded_conv,
    nearest,
    norm_silu_conv,
    padded_conv_patches,
    refuse_group_norms,
    refuse_padded_convs,
    refuse_plain_convs,
)
from fastdit.nn import channels_last

# Blocks -----------------------------------------------------------------------------------------------------------


def residual_block_forward(self, hidden_states: Tensor) -> Tensor:
    shortcut = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
    y = norm_silu_conv(self.conv1, self.norm1, hidden_states)
    return norm_silu_conv(self.conv2, self.norm2, y, residual=shortcut)


def mid_block_forward(self, hidden_states: Tensor) -> Tensor:
    x = checkpointed(self, self.resnets[0], channels_last(hidden_states))
    for attn, resnet in zip(self.attentions, self.resnets[1:], strict=True):
        if attn is not None:
            t, h, w = x.shape[2:]
            tokens = attn(x.permute(0, 2, 3, 4, 1).flatten(1, 3), frame_tokens=h * w)
            x = tokens.unflatten(1, (t, h, w)).permute(0, 4, 1, 2, 3)
        x = checkpointed(self, resnet, x)
    return x


def upsample_forward(self, hidden_states: Tensor) -> Tensor:
    f_t, f_h, f_w = self.upsample_factor
    return self.conv(nearest(hidden_states, (int(f_t), int(f_h), int(f_w))))


class FastditFrameCausalAttnProcessor(Processor):
    """AttnProcessor2_0 with `frame_tokens` in place of the (N, N) mask; calls without it go to the original."""

    def __init__(self):
        from diffusers.models.attention_processor import AttnProcessor2_0

        super().__init__(AttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        frame_tokens: int | None = None,
    ) -> Tensor:
        if frame_tokens is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        x = group_norm(attn.group_norm, hidden_states.transpose(1, 2)).transpose(1, 2)
        o = frame_causal_attention(*queries_keys_values(attn, x), frame_tokens).flatten(2)
        x = attn.to_out[1](attn.to_out[0](o))
        return (x + hidden_states) / attn.rescale_output_factor


def encoder_forward(self, hidden_states: Tensor) -> Tensor:
    x = self.conv_in(channels_last(hidden_states))
    for block in (*self.down_blocks, self.mid_block):
        x = checkpointed(self, block, x)
    return norm_silu_conv(self.conv_out, self.conv_norm_out, x).contiguous()


def decoder_forward(self, hidden_states: Tensor) -> Tensor:
    x = self.conv_in(channels_last(hidden_states))
    for block in (self.mid_block, *self.up_blocks):
        x = checkpointed(self, block, x)
    return norm_silu_conv(self.conv_out, self.conv_norm_out, x).contiguous()


for function in (residual_block_forward, mid_block_forward, upsample_forward, encoder_forward, decoder_forward):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------


def refuse_residual_block(block: Any) -> str | None:
    dropout = getattr(block, "dropout", None)
    if dropout is not None and dropout.p > 0:
        return f"dropout p={dropout.p} between its norm and its convolution"
    norms = refuse_group_norms if isinstance(block.norm1, nn.GroupNorm) else refuse_norms
    shortcut = block.conv_shortcut
    if is_padded_conv(shortcut):
        why = refuse_padded_convs(shortcut)
    else:
        why = None if shortcut is None else refuse_plain_convs(shortcut)
    return (
        unknown(block, "nonlinearity", "norm1", "conv1", "norm2", "dropout", "conv2", "conv_shortcut")
        or refuse_padded_convs(block.conv1, block.conv2)
        or why
        or norms(block.norm1, block.norm2)
        or refuse_activation(block.nonlinearity)
    )


def residual_block_patches(block: Any) -> list[tuple[nn.Module, str, Any]]:
    padded = [conv for conv in (block.conv1, block.conv2, block.conv_shortcut) if is_padded_conv(conv)]
    patches = [(block, "forward", residual_block_forward), *padded_conv_patches(*padded)]
    if block.conv_shortcut is not None and len(padded) == 2:
        patches.append((block.conv_shortcut, "forward", conv_forward))
    return patches


def register_residual_block(norm: str, is_norm: Callable, op: tuple[str, ...], passes: int) -> None:
    """passes: over the input of a convolution, that are spared."""
    register(
        Kind(
            name=f"residual block with repeated borders ({norm}, SiLU, conv, twice)",
            ops=(*op, "causal_conv3d"),
            match=lambda m: (
                has(m, "norm1", "conv1", "norm2", "conv2", "conv_shortcut", "nonlinearity")
                and is_padded_conv(m.conv1)
                and is_norm(m.norm1)
            ),
            refuse=refuse_residual_block,
            patches=residual_block_patches,
            absorbs=lambda block: [block.norm1, block.norm2, block.nonlinearity],
            # and the residual: 3 passes against 1
            saving=lambda block: (
                (passes * block.conv1.conv.in_channels + (passes + 2) * block.conv1.conv.out_channels) * itemsize(block)
            ),
            unit="pixel",
        )
    )


# torch's GroupNorm 3, SiLU 2, padding 2 against the op's 3
register_residual_block("GroupNorm", lambda norm: isinstance(norm, nn.GroupNorm), ("norm_silu",), 4)


def refuse_mid_block(block: Any) -> str | None:
    for attn in (attn for attn in block.attentions if attn is not None):
        if reason := refuse_processor(attn.processor, "AttnProcessor2_0"):
            return reason
        if attn.spatial_norm is not None or attn.norm_q is not None or not attn.residual_connection:
            return "its attention has other norms, or no residual"
        why = refuse_group_norms(attn.group_norm)
        if why is not None:
            return why
    return unknown(block, "attentions", "resnets", "gradient_checkpointing")


def mid_block_patches(block: Any) -> list[tuple[nn.Module, str, Any]]:
    processor = shared(FastditFrameCausalAttnProcessor)
    attentions = [(attn, "processor", processor) for attn in block.attentions if attn is not None]
    return [(block, "forward", mid_block_forward), *attentions]


register(
    Kind(
        name="mid block with frame-causal attention",
        ops=("attention",),
        match=lambda m: (
            has(m, "attentions", "resnets")
            and "prepare_causal_attention_mask" in inspect.unwrap(type(m).forward).__code__.co_names
        ),
        refuse=refuse_mid_block,
        patches=mid_block_patches,
        absorbs=lambda block: [attn.group_norm for attn in block.attentions if attn is not None],
        unit="pixel",
    )
)

register(
    Kind(
        name="nearest upsampling with repeated borders (first frame apart)",
        ops=("causal_conv3d",),
        match=lambda m: has(m, "conv", "upsample_factor") and is_padded_conv(m.conv),
        refuse=lambda m: refuse_padded_convs(m.conv) or unknown(m, "conv", "upsample_factor"),
        patches=lambda m: [(m, "forward", upsample_forward), *padded_conv_patches(m.conv)],
        # passes over the large picture: interpolate 1, cat 2, pad 2 against 1
        saving=lambda m: 4 * m.conv.conv.in_channels * itemsize(m),
        unit="pixel",
    )
)


def register_side(side: str, blocks: str, forward: Callable) -> None:
    register(
        Kind(
            name=f"{side} with repeated borders (first and last convolution)",
            ops=("norm_silu", "causal_conv3d"),
            match=lambda m: (
                has(m, "conv_in", "mid_block", blocks, "conv_norm_out", "conv_act", "conv_out")
                and is_padded_conv(m.conv_in)
            ),
            refuse=lambda m: (
                refuse_padded_convs(m.conv_in, m.conv_out)
                or refuse_group_norms(m.conv_norm_out)
                or refuse_activation(m.conv_act)
                or unknown(
                    m, "conv_in", "mid_block", blocks, "conv_norm_out", "conv_act", "conv_out", "gradient_checkpointing"
                )
            ),
            patches=lambda m: [(m, "forward", forward), *padded_conv_patches(m.conv_in, m.conv_out)],
            absorbs=lambda m: [m.conv_norm_out, m.conv_act],
            # passes: pad 2 before the first convolution; as in a residual block before the last
            saving=lambda m: (2 * m.conv_in.conv.in_channels + 4 * m.conv_out.conv.in_channels) * itemsize(m),
            unit="pixel",
        )
    )


register_side("encoder", "down_blocks", encoder_forward)
register_side("decoder", "up_blocks", decoder_forward)

register(
    Kind(
        name="convolution with repeated borders",
        ops=("causal_conv3d",),
        match=lambda m: is_padded_conv(m),
        refuse=lambda m: refuse_padded_convs(m) or unknown(m, "conv", "time_causal_padding", "pad_mode"),
        patches=lambda m: padded_conv_patches(m),
        saving=lambda m: 2 * m.conv.in_channels * itemsize(m),  # the padded copy
        unit="pixel",
    )
)
