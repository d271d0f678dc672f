"""diffusers' AutoencoderKLMagvit (EasyAnimate): convolutions that keep their last frames, residual blocks, both ends.

A convolution's last input frames stay in its own `prev_features`, as in the original; the first chunk repeats its
first frame. Between the first and the last convolution videos are in channels_last_3d memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, refuse_activation, unknown
from fastdit.integrations.vae_layers import (
    checkpointed,
    conv_forward,
    group_norm_silu,
    nearest,
    refuse_group_norms,
    refuse_plain_convs,
)
from fastdit.integrations.vae_moves import of_frames
from fastdit.nn import channels_last, last_frames


def cached_conv_forward(self, hidden_states: Tensor, *, after: int = 0, residual: Tensor | None = None) -> Tensor:
    """conv([prev_features, x]) + residual over all frames at once; `after` more rows and columns of zeros."""
    x, missing = hidden_states, self.temporal_padding
    kept = None if self.prev_features is None else self.prev_features[..., : x.shape[3], : x.shape[4]]
    _, p_h, p_w = self.padding
    before = missing if kept is None or self.t_stride == 1 else missing - 1
    cache = None if kept is None else kept[:, :, missing - before :]
    frames = x
    if cache is not None and x.shape[2] % self.t_stride != 0:  # the original drops the odd frame, the op would not
        frames, cache, before = torch.cat([cache, x], dim=2), None, 0
    y = conv_forward(
        self,
        frames,
        padding=(before, 0, p_h, p_h + after, p_w, p_w + after),
        time_pad="first",
        cache=cache,
        residual=residual,
    )
    if kept is None and x.shape[2] < missing:
        kept = x[:, :, :1].expand(-1, -1, missing, -1, -1)
    kept = last_frames(x, kept, missing + 1)
    self.prev_features = F.pad(kept, (0, after, 0, after)) if after else kept  # as the original keeps them
    return y


def normed(owner: Any, norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return of_frames(group_norm_silu, norm, x) if owner.spatial_group_norm else group_norm_silu(norm, x)


def residual_block_forward(self, hidden_states: Tensor) -> Tensor:
    shortcut = self.shortcut(hidden_states)
    y = self.conv1(normed(self, self.norm1, hidden_states))
    return self.conv2(normed(self, self.norm2, y), residual=shortcut)


def downsampler_forward(self, hidden_states: Tensor) -> Tensor:
    return self.conv(hidden_states, after=1)


def upsampler_forward(self, hidden_states: Tensor) -> Tensor:
    """2x in space, convolution, 2x in time but for the first chunk."""
    y = self.conv(nearest(hidden_states, (1, 2, 2), first_apart=False))
    if not self.temporal_upsample:
        return y
    if self.prev_features is None:
        self.prev_features = y
        return y
    if self.spatial_group_norm:
        return nearest(y, (2, 1, 1), first_apart=False)
    return F.interpolate(y, scale_factor=(2, 1, 1), mode="trilinear")


def encoder_forward(self, hidden_states: Tensor) -> Tensor:
    x = self.conv_in(channels_last(hidden_states))
    for block in self.down_blocks:
        x = checkpointed(self, block, x)
    return self.conv_out(normed(self, self.conv_norm_out, self.mid_block(x))).contiguous()


def decoder_forward(self, hidden_states: Tensor) -> Tensor:
    x = self.conv_in(channels_last(hidden_states))
    for block in (self.mid_block, *self.up_blocks):
        x = checkpointed(self, block, x)
    return self.conv_out(normed(self, self.conv_norm_out, x)).contiguous()


for function in (
    cached_conv_forward,
    residual_block_forward,
    downsampler_forward,
    upsampler_forward,
    encoder_forward,
    decoder_forward,
):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------


def is_cached_conv(module: Any) -> bool:
    return isinstance(module, nn.Conv3d) and has(module, "temporal_padding", "t_stride", "prev_features")


def refuse_cached_convs(*convs: Any) -> str | None:
    for conv in convs:
        if not is_cached_conv(conv):
            return f"its convolution is a {type(conv).__name__}, without a cache"
        if conv.kernel_size[0] != 3 or conv.t_stride not in (1, 2) or set(conv.dilation) != {1}:
            return "its convolution has another kernel, stride or dilation in time"
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return "its convolution has groups or another border"
    return None


def conv_patches(*convs: Any) -> Iterator:
    return ((conv, "forward", cached_conv_forward) for conv in convs)


BLOCK = ("norm1", "nonlinearity", "conv1", "norm2", "dropout", "conv2", "shortcut", "spatial_group_norm",
         "output_scale_factor")  # fmt: skip


def shortcut_convs(block: Any) -> list[Any]:
    return [] if isinstance(block.shortcut, nn.Identity) else [block.shortcut]


def refuse_residual_block(block: Any) -> str | None:
    if block.dropout.p > 0 or block.output_scale_factor != 1.0:
        return "dropout between its norm and its convolution, or a scaled output"
    return (
        unknown(block, *BLOCK)
        or refuse_cached_convs(block.conv1, block.conv2)
        or refuse_plain_convs(*shortcut_convs(block))
        or refuse_group_norms(block.norm1, block.norm2)
        or refuse_activation(block.nonlinearity)
    )


register(
    Kind(
        name="EasyAnimate residual block (GroupNorm, SiLU, conv, twice)",
        ops=("norm_silu", "causal_conv3d", "next_cache"),
        match=lambda m: has(m, *BLOCK) and is_cached_conv(m.conv1),
        refuse=refuse_residual_block,
        patches=lambda m: [
            (m, "forward", residual_block_forward),
            *conv_patches(m.conv1, m.conv2),
            *((conv, "forward", conv_forward) for conv in shortcut_convs(m)),
        ],
        absorbs=lambda m: [m.norm1, m.norm2, m.nonlinearity],
        # passes before each conv: norm 3, silu 2 against 3, cat 2, windows of one frame 2; residual 4 against 1
        saving=lambda m: (6 * (m.conv1.in_channels + m.conv2.in_channels) + 3 * m.conv2.out_channels) * itemsize(m),
        unit="pixel",
    )
)


def register_resampling(name: str, attributes: tuple[str, ...], stride: int, forward: Callable) -> None:
    register(
        Kind(
            name=name,
            ops=("causal_conv3d", "next_cache"),
            match=lambda m: (
                has(m, "conv", *attributes) and is_cached_conv(m.conv) and m.conv.stride[1:] == (stride, stride)
            ),
            refuse=lambda m: unknown(m, "conv", *attributes) or refuse_cached_convs(m.conv),
            patches=lambda m: [(m, "forward", forward), *conv_patches(m.conv)],
            saving=lambda m: 6 * m.conv.in_channels * itemsize(m),  # cat 2, windows of one frame 2, padding 2
            unit="pixel",
        )
    )


register_resampling("EasyAnimate downsampling", (), 2, downsampler_forward)
register_resampling(
    "EasyAnimate upsampling", ("temporal_upsample", "spatial_group_norm", "prev_features"), 1, upsampler_forward
)


def register_side(side: str, blocks: str, forward: Callable) -> None:
    parts = ("conv_in", "mid_block", "conv_norm_out", "conv_act", "conv_out", "spatial_group_norm", blocks)
    register(
        Kind(
            name=f"EasyAnimate {side} (first and last convolution)",
            ops=("norm_silu", "causal_conv3d", "next_cache"),
            match=lambda m: has(m, *parts) and is_cached_conv(m.conv_in),
            refuse=lambda m: (
                unknown(m, *parts, "gradient_checkpointing")
                or refuse_cached_convs(m.conv_in, m.conv_out)
                or refuse_group_norms(m.conv_norm_out)
                or refuse_activation(m.conv_act)
            ),
            patches=lambda m: [(m, "forward", forward), *conv_patches(m.conv_in, m.conv_out)],
            absorbs=lambda m: [m.conv_norm_out, m.conv_act],
            saving=lambda m: (4 * m.conv_in.in_channels + 6 * m.conv_out.in_channels) * itemsize(m),
            unit="pixel",
        )
    )


register_side("encoder", "down_blocks", encoder_forward)
register_side("decoder", "up_blocks", decoder_forward)
