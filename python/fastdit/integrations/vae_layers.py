"""What the replaced layers of video VAEs share. Videos are (B, C, T, H, W); inside a VAE in channels_last_3d memory.

Convolutions are patched, then called with what is fused into them, so that hooks on the convolution itself still run.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.registry import original, record_of
from fastdit.integrations.structure import has
from fastdit.integrations.vae_moves import from_tokens, pixels, tokens, video
from fastdit.reference.conv import TILES_CHANNELS, misfit

# Convolutions -----------------------------------------------------------------------------------------------------


def conv_forward(self, input: Tensor, *, padding: tuple[int, int, int, int, int, int] | None = None, **fused) -> Tensor:
    """nn.Conv3d, nn.Conv2d over each frame of a video, nn.Conv1d over the frames of each pixel: `ops.causal_conv3d`.

    padding None is the layer's own, zeros. fused: more of the op's keywords (time_pad, space_pad, cache, norm,
    norm_weight, norm_eps, act, residual). Images (a Conv2d called with four dims) go to the layer as it was.
    """
    if input.ndim != 5:
        return original(self, input)
    weight, stride, dilation, own = self.weight, self.stride, self.dilation, self.padding
    if weight.ndim == 4:  # over frames
        weight, stride, dilation, own = weight.unsqueeze(2), (1, *stride), (1, *dilation), (0, *own)
    elif weight.ndim == 3:  # over time
        weight, stride, dilation, own = weight[..., None, None], (*stride, 1, 1), (*dilation, 1, 1), (*own, 0, 0)
    if padding is None:
        p_t, p_h, p_w = own
        padding = (p_t, p_t, p_h, p_h, p_w, p_w)
    record, algo = record_of(self), "auto"
    if record is not None and record.conv_algo != "auto" and input.is_cpu and min(weight.shape[:2]) >= TILES_CHANNELS:
        algo = "auto" if misfit(record.conv_algo, weight.shape, stride, dilation) else record.conv_algo
    return ops.causal_conv3d(
        input, weight, self.bias, stride=stride, dilation=dilation, padding=padding, algo=algo, **fused
    )


def padded_conv_forward(self, hidden_states: Tensor, **fused) -> Tensor:
    """A module that pads its input by `time_causal_padding` (F.pad's order) and calls `conv`: no padded copy."""
    w0, w1, h0, h1, t0, t1 = self.time_causal_padding
    zeros = self.pad_mode == "constant"
    return self.conv(
        hidden_states,
        padding=(t0, t1, h0, h1, w0, w1),
        time_pad="zeros" if zeros else "first",
        space_pad="zeros" if zeros else "replicate",
        **fused,
    )


conv_forward.__name__ = padded_conv_forward.__name__ = "forward"


def is_plain_conv(conv: Any) -> bool:
    """nn.Conv1d, nn.Conv2d, nn.Conv3d, or a Conv3d that only cuts inputs above a memory limit into pieces."""
    if type(conv) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return True
    return isinstance(conv, nn.Conv3d) and "memory_count" in type(conv).forward.__code__.co_varnames


def refuse_plain_convs(*convs: Any, borders: str = "zeros") -> str | None:
    for conv in convs:
        if not is_plain_conv(conv) or conv.groups != 1 or conv.padding_mode != borders or isinstance(conv.padding, str):
            return f"its convolution is a {type(conv).__name__} with groups, other borders or a wrapper"
    return None


def is_padded_conv(module: Any) -> bool:
    """Of the input alone: one that takes a cache too has a forward of its own."""
    padded = has(module, "conv", "time_causal_padding", "pad_mode") and isinstance(module.conv, nn.Conv3d)
    return padded and inspect.unwrap(type(module).forward).__code__.co_argcount == 2


def refuse_padded_convs(*modules: Any) -> str | None:
    for module in modules:
        if not is_padded_conv(module):
            return f"its convolution is a {type(module).__name__}, not one that pads and calls `conv`"
        if module.pad_mode not in ("replicate", "constant"):
            return f"its convolution pads with {module.pad_mode}"
        if module.time_causal_padding[5] != 0 or any(module.conv.padding):
            return "its convolution sees later frames, or pads twice"
    return refuse_plain_convs(*(module.conv for module in modules))


def padded_conv_patches(*modules: Any) -> list[tuple[nn.Module, str, Any]]:
    padded = [(module, "forward", padded_conv_forward) for module in modules]
    return padded + [(module.conv, "forward", conv_forward) for module in modules]


# Norms and activations --------------------------------------------------------------------------------------------


def channel_norm(norm: Any) -> dict[str, Any]:
    """Keyword arguments of a convolution that applies this norm (F.normalize * sqrt(C) * gamma) to its input."""
    return {"norm": "channel_l2", "norm_weight": norm.gamma.flatten()}


def group_norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return ops.norm_silu(x, norm="group", weight=norm.weight, bias=norm.bias, groups=norm.num_groups, eps=norm.eps)


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """The GroupNorm alone. In channels_last memory torch's takes E[x^2] - E[x]^2 for variance: too coarse for fp32."""
    if x.dtype.itemsize < 4:
        return norm(x)
    b, c, *pixels = x.shape
    ones = [1] * len(pixels)

    def group_mean(t: Tensor) -> Tensor:
        means = t.flatten(2).mean(2).view(b, norm.num_groups, -1)
        return means.mean(-1, keepdim=True).expand_as(means).reshape(b, c, *ones)

    centred = x - group_mean(x)
    scale = norm.weight.view(c, *ones) * torch.rsqrt(group_mean(centred.square()) + norm.eps)
    return torch.addcmul(norm.bias.view(c, *ones), centred, scale)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm over the channels of each pixel."""
    y = ops.norm_modulate(tokens(x), weight=norm.weight, bias=norm.bias, eps=norm.eps)
    return from_tokens(y, x)


def spatial_norm(
    norm: nn.GroupNorm, f: Tensor, scale: Tensor, shift: Tensor, first_apart: bool, act: str | None = None
) -> Tensor:
    """act(GroupNorm(f) * scale + shift), f (B, C, T, H, W), the tables (B, C, t, h, w) enlarged to f's size.

    The enlarged tables are never made in space; their first frame may stay one (`first_apart`). A convolution of one
    pixel commutes with nearest-neighbour enlarging, so that tables come from convolutions of the small picture.
    """
    (frames, rows, columns), (h, w) = f.shape[2:], scale.shape[3:]
    tables = []
    for table in (scale, shift):
        if table.shape[2] != frames:
            repeats = (frames - 1) // (table.shape[2] - 1) if first_apart else frames // table.shape[2]
            table = nearest(table, (repeats, 1, 1), first_apart)
        tables.append(pixels(table)[:, :, :, None, :, None])  # (B, T, h, 1, w, 1, C)
    normed = pixels(group_norm(norm, f)).unflatten(3, (w, columns // w)).unflatten(2, (h, rows // h))
    y = torch.addcmul(tables[1], normed, tables[0])  # (B, T, h, rows/h, w, columns/w, C)
    y = F.silu(y, inplace=not y.requires_grad) if act == "silu" else y
    return video(y.flatten(4, 5).flatten(2, 3))


def norm_silu_conv(conv: Any, norm: Any, x: Tensor, **fused) -> Tensor:
    """conv(silu(norm(x))): a channel norm runs inside the convolution, a GroupNorm before it."""
    if isinstance(norm, nn.GroupNorm):
        return conv(group_norm_silu(norm, x), **fused)
    return conv(x, **channel_norm(norm), act="silu", **fused)


def refuse_group_norms(*norms: Any) -> str | None:
    for norm in norms:
        if type(norm) is not nn.GroupNorm or norm.weight is None:
            return f"its norm is a {type(norm).__name__} without weights, or not a GroupNorm"
    return None


# Resampling and attention -----------------------------------------------------------------------------------------


def nearest(x: Tensor, factor: tuple[int, int, int], first_apart: bool = True) -> Tensor:
    """Nearest-neighbour upsampling by factor (t, h, w), channels_last_3d: one copy. The first frame may stay one."""
    (b, c, t, h, w), (f_t, f_h, f_w) = x.shape, factor
    y = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None].expand(b, t, f_t, h, f_h, w, f_w, c)
    y = y.reshape(b, t * f_t, h * f_h, w * f_w, c)
    return y[:, f_t - 1 if first_apart else 0 :].permute(0, 4, 1, 2, 3)


WIDEST = 512  # channels of a head that the GPU kernels hold


def frame_causal_attention(q: Tensor, k: Tensor, v: Tensor, frame_tokens: int) -> Tensor:
    """(B, N, H, D): a token sees every frame up to its own. Wider heads frame by frame, over the keys seen so far."""
    if q.shape[-1] <= WIDEST:
        return ops.attention(q, k, v, frame_tokens=frame_tokens)
    ends = range(frame_tokens, q.shape[1] + 1, frame_tokens)
    return torch.cat([ops.attention(q[:, n - frame_tokens : n], k[:, :n], v[:, :n]) for n in ends], dim=1)


def checkpointed(owner: Any, block: Any, *args: Any) -> Any:
    """block(*args), under the gradient checkpointing that is switched on in `owner`."""
    if torch.is_grad_enabled() and owner.gradient_checkpointing:
        return owner._gradient_checkpointing_func(block, *args)
    return block(*args)
