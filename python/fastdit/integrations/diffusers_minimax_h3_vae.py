"""diffusers' AutoencoderKLMiniMaxH3: the convolutional encoder, and the blocks of the decoder, a transformer.

Convolutions mirror pictures at their borders and put zeros before the first frame; GroupNorm is per frame. Inside the
encoder videos are in channels_last_3d memory. The decoder's stream and norms are fp32 beside layers in two bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_minimax_h3 import Rotary, halves, refuse_rms, register_attention, rms
from fastdit.integrations.diffusers_processor import Processor, queries_keys_values
from fastdit.integrations.joint import Stream, joint_attention
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, parameters, unknown
from fastdit.integrations.vae_layers import conv_forward, group_norm_silu
from fastdit.integrations.vae_moves import of_frames
from fastdit.nn import channels_last

# The encoder ------------------------------------------------------------------------------------------------------

SPACE_PADS = {"reflect": "reflect", "replicate": "replicate", "constant": "zeros"}  # F.pad's names, and the op's


def causal_conv_forward(self, hidden_states: Tensor, *, after: int = 0, residual: Tensor | None = None) -> Tensor:
    """conv(x) + residual; `after` more rows and columns."""
    p = self.spatial_padding
    return conv_forward(
        self,
        hidden_states,
        padding=(self.temporal_padding, 0, p, p + after, p, p + after),
        space_pad=SPACE_PADS[self.spatial_padding_mode],
        residual=residual,
    )


def residual_block_forward(self, hidden_states: Tensor) -> Tensor:
    shortcut = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
    y = self.conv1(of_frames(group_norm_silu, self.norm1, hidden_states))
    return self.conv2(of_frames(group_norm_silu, self.norm2, y), residual=shortcut)


def downsample_forward(self, hidden_states: Tensor) -> Tensor:
    return self.conv(hidden_states, after=int(self.spatial_stride == 2))


def encoder_forward(self, hidden_states: Tensor) -> Tensor:
    x = self.conv_in(channels_last(hidden_states))
    for block in self.down_blocks:
        x = block(x)
    return self.conv_out(of_frames(group_norm_silu, self.norm_out, x)).contiguous()


# The decoder ------------------------------------------------------------------------------------------------------


def decoder_block_forward(self, hidden_states: Tensor, rotary_emb: Rotary = None) -> Tensor:
    from diffusers.models.modeling_utils import get_parameter_dtype

    narrow = get_parameter_dtype(self.attn.to_q)
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.scale1.dtype))
    y = self.attn(ops.norm_modulate(x, **rms(self.norm1)).to(narrow), rotary_emb)
    x, h = ops.gate_residual_norm_modulate(x, y, self.scale1[None], **rms(self.norm2))
    return ops.gate_residual(x, self.ff(h.to(narrow)), self.scale2[None])


class FastditMiniMaxH3VideoAttnProcessor(Processor):
    """MiniMaxH3VideoAttnProcessor with `qk_norm_rope`, of the first channels of each head, and `attention`."""

    name = "MiniMaxH3VideoAttnProcessor"

    def __init__(self):
        from diffusers.models.autoencoders.autoencoder_kl_minimax_h3 import MiniMaxH3VideoAttnProcessor

        super().__init__(MiniMaxH3VideoAttnProcessor())

    def __call__(self, attn: Any, hidden_states: Tensor, rotary_emb: Rotary = None) -> Tensor:
        q, k, v = queries_keys_values(attn, hidden_states)
        stream = Stream(q, k, v, attn.norm_q, attn.norm_k, *halves(rotary_emb), layout="half")
        return attn.to_out[0](joint_attention(stream)[0])


for function in (
    causal_conv_forward,
    residual_block_forward,
    downsample_forward,
    encoder_forward,
    decoder_block_forward,
):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------

CONV = ("spatial_padding", "temporal_padding", "spatial_padding_mode")


def is_causal_conv(module: Any) -> bool:
    return isinstance(module, nn.Conv3d) and has(module, *CONV)


def refuse_convs(*convs: Any) -> str | None:
    for conv in convs:
        if not is_causal_conv(conv):
            return f"its convolution is a {type(conv).__name__}"
        if conv.groups != 1 or any(conv.padding) or conv.spatial_padding_mode not in SPACE_PADS:
            return "its convolution has groups, pads twice or has another border"
    return None


def refuse_frame_norms(*norms: Any) -> str | None:
    for norm in norms:
        if type(norm) is nn.GroupNorm or not isinstance(norm, nn.GroupNorm) or norm.weight is None:
            return f"its norm is a {type(norm).__name__} without weights, or not a GroupNorm of frames"
    return None


def conv_patches(*convs: Any) -> Iterator:
    return ((conv, "forward", causal_conv_forward) for conv in convs if conv is not None)


BLOCK = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")
DOWN = ("conv", "spatial_stride", "spatial_padding_mode")
ENCODER = ("conv_in", "down_blocks", "norm_out", "conv_out")
VIT = ("norm1", "attn", "scale1", "norm2", "ff", "scale2")


def refuse_downsampling(module: Any) -> str | None:
    if module.spatial_padding_mode != module.conv.spatial_padding_mode:
        return "its two borders differ"
    return unknown(module, *DOWN) or refuse_convs(module.conv)


register(
    Kind(
        name="MiniMax-H3 residual block (GroupNorm of frames, SiLU, conv, twice)",
        ops=("norm_silu", "causal_conv3d"),
        match=lambda m: has(m, *BLOCK) and is_causal_conv(m.conv1),
        refuse=lambda m: (
            unknown(m, *BLOCK)
            or refuse_convs(m.conv1, m.conv2, *([] if m.conv_shortcut is None else [m.conv_shortcut]))
            or refuse_frame_norms(m.norm1, m.norm2)
        ),
        patches=lambda m: [(m, "forward", residual_block_forward), *conv_patches(m.conv1, m.conv2, m.conv_shortcut)],
        absorbs=lambda m: [m.norm1, m.norm2],
        # passes before each conv: frames to the batch and back 4, norm 3, silu 2 against 3, padding twice 4; the
        # residual 3 against 1
        saving=lambda m: (10 * (m.conv1.in_channels + m.conv2.in_channels) + 2 * m.conv2.out_channels) * itemsize(m),
        unit="pixel",
    )
)
register(
    Kind(
        name="MiniMax-H3 downsampling (strided convolution)",
        ops=("causal_conv3d",),
        match=lambda m: has(m, *DOWN) and is_causal_conv(m.conv),
        refuse=refuse_downsampling,
        patches=lambda m: [(m, "forward", downsample_forward), *conv_patches(m.conv)],
        saving=lambda m: 4 * m.conv.in_channels * itemsize(m),  # padding in space, then in time
        unit="pixel",
    )
)
register(
    Kind(
        name="MiniMax-H3 encoder (first and last convolution)",
        ops=("norm_silu", "causal_conv3d"),
        match=lambda m: has(m, *ENCODER) and is_causal_conv(m.conv_in),
        refuse=lambda m: unknown(m, *ENCODER) or refuse_convs(m.conv_in, m.conv_out) or refuse_frame_norms(m.norm_out),
        patches=lambda m: [(m, "forward", encoder_forward), *conv_patches(m.conv_in, m.conv_out)],
        absorbs=lambda m: [m.norm_out],
        # passes: padding twice before the first convolution, as in a residual block before the last
        saving=lambda m: (4 * m.conv_in.in_channels + 10 * m.conv_out.in_channels) * itemsize(m),
        unit="pixel",
    )
)
register(
    Kind(
        name="MiniMax-H3 decoder block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *VIT) and parameters(m) == ["hidden_states", "rotary_emb"],
        refuse=lambda m: refuse_rms(m.norm1, m.norm2) or unknown(m, *VIT),
        patches=lambda m: [(m, "forward", decoder_block_forward)],
        absorbs=lambda m: [m.norm1, m.norm2],
        # passes over (tokens, C): eager 2*(norm 2, scale 2, add 3), fused 2 + 4 + 3
        saving=lambda m: 5 * m.scale1.numel() * m.scale1.element_size(),
        precision="fp32",
        block=True,
    )
)
register_attention(FastditMiniMaxH3VideoAttnProcessor, ["hidden_states", "rotary_emb"], "dim_head")
