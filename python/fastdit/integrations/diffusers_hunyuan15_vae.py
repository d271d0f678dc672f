"""diffusers' AutoencoderKLHunyuanVideo15 and AutoencoderKLHunyuanImageRefiner: attention, shuffles, the two ends.

Their convolutions and residual blocks are those of `diffusers_hunyuan_vae`, with channel norms that run inside the
convolution. The image refiner has no mask, and treats every frame as a first one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_hunyuan_vae import register_residual_block
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, refuse_activation, refuse_norms, unknown
from fastdit.integrations.vae_layers import (
    channel_norm,
    checkpointed,
    conv_forward,
    frame_causal_attention,
    is_padded_conv,
    norm_silu_conv,
    padded_conv_patches,
    refuse_padded_convs,
    refuse_plain_convs,
)
from fastdit.nn import channels_last

# Attention --------------------------------------------------------------------------------------------------------


def attention_forward(self, x: Tensor) -> Tensor:
    """x + proj_out(attention(to_q(n), to_k(n), to_v(n))), n = norm(x): frame-causal where the original makes a mask."""
    x = channels_last(x)
    t, h, w = x.shape[2:]
    # (B, C, T, H, W) -> (B, N, 1, C): views of channels_last_3d memory
    q, k, v = (
        conv(x, **channel_norm(self.norm)).permute(0, 2, 3, 4, 1).flatten(1, 3).unsqueeze(2)
        for conv in (self.to_q, self.to_k, self.to_v)
    )
    y = frame_causal_attention(q, k, v, h * w) if is_causal(self) else ops.attention(q, k, v)
    return self.proj_out(y.squeeze(2).unflatten(1, (t, h, w)).permute(0, 4, 1, 2, 3), residual=x)


# Shuffles between channels and pixels -----------------------------------------------------------------------------


def to_pixels(x: Tensor, r: int) -> Tensor:
    """(B, r*2*2*C, T, H, W) -> (B, C, r*T, 2H, 2W), channels in the order (r, 2, 2, C): one copy."""
    y = x.permute(0, 2, 3, 4, 1).unflatten(4, (r, 2, 2, -1)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return y.flatten(5, 6).flatten(3, 4).flatten(1, 2).permute(0, 4, 1, 2, 3)  # (B, T, r, H, 2, W, 2, C) before


def to_channels(x: Tensor, r: int) -> Tensor:
    """The inverse of `to_pixels`: (B, C, r*T, 2H, 2W) -> (B, r*2*2*C, T, H, W)."""
    y = x.permute(0, 2, 3, 4, 1).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, r))
    return y.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).permute(0, 4, 1, 2, 3)


def repeated(x: Tensor, n: int) -> Tensor:
    """Each channel n times in a row."""
    return x.permute(0, 2, 3, 4, 1).unsqueeze(-1).expand(*[-1] * 5, n).flatten(4).permute(0, 4, 1, 2, 3)


def averaged(x: Tensor, n: int) -> Tensor:
    """The mean of each run of n channels."""
    return x.permute(0, 2, 3, 4, 1).unflatten(4, (-1, n)).mean(5).permute(0, 4, 1, 2, 3)


def first_and_rest(owner: Any, *videos: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """First frames, which stay one frame in time, and the others; to the image refiner all are first frames."""
    first = 1 if splits_first_frame(owner) else videos[0].shape[2]
    return [x[:, :, :first] for x in videos], [x[:, :, first:] for x in videos]


def upsample_forward(self, x: Tensor) -> Tensor:
    """Pixel shuffle of conv(x) and of x, whose channels are repeated to fit; 2x in time but for the first frame."""
    h = self.conv(x)
    if not self.add_temporal_upsample:
        return to_pixels(h + repeated(x, self.repeats), 1)
    (h_first, x_first), (h_rest, x_rest) = first_and_rest(self, h, x)
    first = to_pixels(h_first, 1)
    first = first[:, : first.shape[1] // 2] + repeated(to_pixels(x_first, 1), self.repeats // 2)
    return torch.cat([first, to_pixels(h_rest + repeated(x_rest, self.repeats), 2)], dim=2)


def downsample_forward(self, x: Tensor) -> Tensor:
    """Inverse pixel shuffle of conv(x) and of x, whose channels are averaged to fit; 2x in time but for the first."""
    if not self.add_temporal_downsample:
        return to_channels(self.conv(x, residual=averaged(x, self.group_size)), 1)
    (h_first, x_first), (h_rest, x_rest) = first_and_rest(self, self.conv(x), x)
    first = to_channels(h_first, 1)
    first = torch.cat([first, first], dim=1) + to_channels(averaged(x_first, self.group_size // 2), 1)
    return torch.cat([first, to_channels(h_rest + averaged(x_rest, self.group_size), 2)], dim=2)


# The ends ---------------------------------------------------------------------------------------------------------


def encoder_forward(self, hidden_states: Tensor) -> Tensor:
    x = self.conv_in(channels_last(hidden_states))
    for block in (*self.down_blocks, self.mid_block):
        x = checkpointed(self, block, x)
    return norm_silu_conv(self.conv_out, self.norm_out, x, residual=averaged(x, self.group_size)).contiguous()


def decoder_forward(self, hidden_states: Tensor) -> Tensor:
    x = channels_last(hidden_states)
    x = self.conv_in(x, residual=repeated(x, self.repeat))
    for block in (self.mid_block, *self.up_blocks):
        x = checkpointed(self, block, x)
    return norm_silu_conv(self.conv_out, self.norm_out, x).contiguous()


for function in (attention_forward, upsample_forward, downsample_forward, encoder_forward, decoder_forward):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------


def code(module: Any) -> Any:
    return inspect.unwrap(type(module).forward).__code__


def is_causal(attention: Any) -> bool:
    return "prepare_causal_attention_mask" in code(attention).co_names


def splits_first_frame(module: Any) -> bool:
    return "h_first" in code(module).co_varnames


# torch's channel norm 9, SiLU 2, padding 2
register_residual_block("channel norm", lambda norm: has(norm, "gamma"), (), 13)

PROJECTIONS = ("to_q", "to_k", "to_v", "proj_out")

register(
    Kind(
        name="video attention of a VAE (frame-causal where the original is)",
        ops=("causal_conv3d", "attention"),
        match=lambda m: has(m, "norm", *PROJECTIONS) and hasattr(m.norm, "gamma"),
        refuse=lambda m: (
            refuse_plain_convs(*(getattr(m, name) for name in PROJECTIONS))
            or refuse_norms(m.norm)
            or unknown(m, "norm", *PROJECTIONS, "prepare_causal_attention_mask")
        ),
        patches=lambda m: [
            (m, "forward", attention_forward),
            *((getattr(m, name), "forward", conv_forward) for name in PROJECTIONS),
        ],
        absorbs=lambda m: [m.norm],
        # passes: norm 9, transposed copies of q, k, v and of the output 8, residual 2; the mask is beyond counting
        saving=lambda m: 19 * m.in_channels * itemsize(m),
        unit="pixel",
    )
)


def register_shuffle(name: str, method: str, time: str, factor: str, forward: Callable) -> None:
    register(
        Kind(
            name=name,
            ops=("causal_conv3d",),
            match=lambda m: has(m, "conv", method, time, factor) and is_padded_conv(m.conv),
            refuse=lambda m: refuse_padded_convs(m.conv) or unknown(m, "conv", time, factor),
            # the flag as diffusers sets it is numpy's, which torch.compile takes for a tensor
            patches=lambda m: [
                (m, "forward", forward),
                (m, time, bool(getattr(m, time))),
                *padded_conv_patches(m.conv),
            ],
            # passes: padding 2 of the input; copies, sum and concatenations 6 of the output against 4
            saving=lambda m: 2 * (m.conv.conv.in_channels + m.conv.conv.out_channels) * itemsize(m),
            unit="pixel",
        )
    )


register_shuffle(
    "upsampling by pixel shuffle", "_dcae_upsample_rearrange", "add_temporal_upsample", "repeats", upsample_forward
)
register_shuffle(
    "downsampling by pixel shuffle", "_dcae_downsample_rearrange", "add_temporal_downsample", "group_size",
    downsample_forward,
)  # fmt: skip


def register_side(side: str, blocks: str, shortcut: str, forward: Callable) -> None:
    held = ("conv_in", "mid_block", blocks, "norm_out", "conv_act", "conv_out", shortcut)
    register(
        Kind(
            name=f"{side} with repeated borders and shortcuts (first and last convolution)",
            ops=("causal_conv3d",),
            match=lambda m: has(m, *held) and is_padded_conv(m.conv_in),
            refuse=lambda m: (
                refuse_padded_convs(m.conv_in, m.conv_out)
                or refuse_norms(m.norm_out)
                or refuse_activation(m.conv_act)
                or unknown(m, *held, "gradient_checkpointing")
            ),
            patches=lambda m: [(m, "forward", forward), *padded_conv_patches(m.conv_in, m.conv_out)],
            absorbs=lambda m: [m.norm_out, m.conv_act],
            # passes: pad 2 before the first convolution; as in a residual block before the last
            saving=lambda m: (2 * m.conv_in.conv.in_channels + 13 * m.conv_out.conv.in_channels) * itemsize(m),
            unit="pixel",
        )
    )


register_side("encoder", "down_blocks", "group_size", encoder_forward)
register_side("decoder", "up_blocks", "repeat", decoder_forward)
