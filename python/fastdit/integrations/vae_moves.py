"""Pixels to channels and back, one copy each. Videos are (B, C, T, H, W) in channels_last_3d memory."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def pixels(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, T, H, W, C), a view; contiguous where x is in channels_last_3d memory."""
    return x.permute(0, 2, 3, 4, 1)


def video(x: Tensor) -> Tensor:
    """(B, T, H, W, C) -> (B, C, T, H, W), a view."""
    return x.permute(0, 4, 1, 2, 3)


def grid_of(x: Tensor) -> tuple[int, int, int]:
    return x.shape[2], x.shape[3], x.shape[4]


def tokens(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, T*H*W, C), contiguous channels: a copy only where x is not in channels_last_3d memory."""
    return pixels(x).flatten(1, 3).contiguous()


def from_tokens(y: Tensor, x: Tensor) -> Tensor:
    """(B, T*H*W, C) -> (B, C, T, H, W) of x's size, a view."""
    return video(y.unflatten(1, x.shape[2:]))


def space_to_depth(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """(B, C, T, H, W) -> (B, T/s_t, H/s_h, W/s_w, C*s_t*s_h*s_w), the channels in the order (c, t, h, w)."""
    s_t, s_h, s_w = stride
    x = x.unflatten(4, (-1, s_w)).unflatten(3, (-1, s_h)).unflatten(2, (-1, s_t))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def depth_to_space(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """(B, C*s_t*s_h*s_w, T, H, W), channels in the order (c, t, h, w) -> (B, C, T*s_t, H*s_h, W*s_w)."""
    s_t, s_h, s_w = stride
    x = x.unflatten(1, (-1, s_t, s_h, s_w)).permute(0, 5, 2, 6, 3, 7, 4, 1)  # (B, T, s_t, H, s_h, W, s_w, C)
    return video(x.flatten(5, 6).flatten(3, 4).flatten(1, 2))


def of_frames(function: Callable[[nn.GroupNorm, Tensor], Tensor], norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """function(norm, images) over each frame of a video: views, where x is in channels_last_3d memory."""
    y = function(norm, x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
