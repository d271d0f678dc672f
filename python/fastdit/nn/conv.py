"""Layers of causal video VAEs. Inside, videos are (B, C, T, H, W) in channels_last_3d memory."""

import torch
from torch import Tensor, nn

from fastdit import ops

LARGE = 2**22  # elements of a chunk; below, one call for all frames


class CausalConv3d(nn.Conv3d):
    """nn.Conv3d that sees no later frame, one op without padded copies.

        y = conv(act(norm([cache, x]))) + bias + residual

    Args: in_channels, out_channels, kernel_size, stride, dilation, bias, device, dtype of nn.Conv3d.
    Shapes:
        x (B, C, T, H, W) -> (B, D, T, H, W), fewer with a stride. `cache` are the input frames before x, as passed
        (`ops.next_cache`); frames still missing are zeros. `padding` of a call are six ints (t0, t1, h0, h1, w0, w1);
        None is causal "same" padding. `norm_weight` (C,) is a `ChannelNorm`'s; `act` "silu".
    Source: Wan2.1 wan/modules/vae.py CausalConv3d; diffusers WanCausalConv3d.
    """

    def forward(self, x: Tensor, cache=None, *, padding=None, norm_weight=None, act=None, residual=None) -> Tensor:
        if padding is None and self.dilation != (1, 1, 1):
            t, h, w = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
            padding = (t, 0, h // 2, h - h // 2, w // 2, w - w // 2)
        return ops.causal_conv3d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            dilation=self.dilation,
            padding=padding,
            cache=cache,
            norm=None if norm_weight is None else "channel_l2",
            norm_weight=norm_weight,
            act=act,
            residual=residual,
        )


class FrameConv2d(nn.Conv2d):
    """nn.Conv2d over each frame of a video; `padding` are six ints with zeros for time, None is "same"."""

    def forward(self, x: Tensor, *, padding=None, norm_weight=None, residual=None) -> Tensor:
        return ops.causal_conv3d(
            x,
            self.weight.unsqueeze(2),
            self.bias,
            stride=(1, *self.stride),
            padding=padding,
            norm=None if norm_weight is None else "channel_l2",
            norm_weight=norm_weight,
            residual=residual,
        )


def last_frames(x: Tensor, cache: Tensor | None, kernel: int) -> Tensor:
    """`ops.next_cache`; x itself where it is exactly these frames and shares its memory with nobody: no copy."""
    if x.shape[2] == kernel - 1 and not torch.compiler.is_compiling():
        if x.untyped_storage().nbytes() == x.numel() * x.element_size():
            return x
    return ops.next_cache(x, cache, kernel)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def frame_attention(qkv: Tensor) -> Tensor:
    """Single-head self-attention inside each frame: (B, 3C, T, H, W) -> (B, C, T, H, W).

    In channels_last_3d memory the queries, keys and values are strided views and the result needs no copy.
    """
    b, c3, t, h, w = qkv.shape
    q, k, v = channels_last(qkv).permute(0, 2, 3, 4, 1).reshape(b * t, h * w, 3, 1, c3 // 3).unbind(2)
    return ops.attention(q, k, v).reshape(b, t, h, w, c3 // 3).permute(0, 4, 1, 2, 3)


def upsample2x(x: Tensor, frames: int = 1) -> Tensor:
    """Nearest-neighbour 2x in H and W; with frames = 2 the two channel halves become alternate frames.

    (B, frames*C, T, H, W) -> (B, C, T*frames, 2H, 2W) in channels_last_3d memory: one copy.
    """
    b, c, t, h, w = x.shape
    c //= frames
    y = x.unflatten(1, (frames, c)).permute(0, 3, 1, 4, 5, 2)  # (B, T, frames, H, W, C)
    y = y[:, :, :, :, None, :, None].expand(b, t, frames, h, 2, w, 2, c)
    return y.reshape(b, t * frames, 2 * h, 2 * w, c).permute(0, 4, 1, 2, 3)


def upsampled(conv: nn.Module, x: Tensor, frames: int = 1) -> Tensor:
    """conv(upsample2x(x, frames)), one frame of x after the other: the pictures between them are the largest."""
    if torch.compiler.is_compiling() or x.shape[2] == 1 or x.numel() < LARGE:
        return conv(upsample2x(x, frames))
    return torch.cat([conv(upsample2x(frame, frames)) for frame in x.split(1, dim=2)], dim=2)
