"""diffusers' AutoencoderKLCogVideoX: cached convolutions, residual blocks, spatial norms, resampling, the two ends.

The dict of caches keeps its keys and its life time: each convolution's last input frames, after norm and SiLU as in the
original (GroupNorm takes its statistics over a chunk, so they can't be applied again later). The first chunk repeats
its first frame in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, refuse_activation, unknown
from fastdit.integrations.vae_layers import (
    checkpointed,
    conv_forward,
    group_norm_silu,
    nearest,
    refuse_group_norms,
    refuse_plain_convs,
    spatial_norm,
)
from fastdit.models.vae import AFTER
from fastdit.nn import channels_last, last_frames, upsampled

Cache = dict[str, Any] | None

# Convolutions and norms -------------------------------------------------------------------------------------------


def cached_conv_forward(self, inputs: Tensor, conv_cache: Tensor | None = None, *, residual: Tensor | None = None):
    """conv([conv_cache, inputs]) + residual, and the next cache; without a cache the first frame is repeated."""
    p_w, _, p_h, _, p_t, _ = self.time_causal_padding
    replicate = self.pad_mode == "replicate"
    output = self.conv(
        inputs,
        padding=(p_t, 0, p_h, p_h, p_w, p_w),
        time_pad="first",
        space_pad="replicate" if replicate else "zeros",
        cache=None if replicate or p_t == 0 else conv_cache,
        residual=residual,
    )
    return output, None if replicate or p_t == 0 else last_frames(inputs, conv_cache, p_t + 1)


def spatial_norm_forward(self, f: Tensor, zq: Tensor, conv_cache: Cache = None, *, act: str | None = None):
    """act(GroupNorm(f) * conv_y(zq) + conv_b(zq)), zq enlarged to f's size."""
    zq, frames = channels_last(zq), f.shape[2]
    scale, shift = self.conv_y(zq)[0], self.conv_b(zq)[0]
    return spatial_norm(self.norm_layer, f, scale, shift, frames > 1 and frames % 2 == 1, act), {}


# Blocks -----------------------------------------------------------------------------------------------------------


def normed(norm: Any, x: Tensor, zq: Tensor | None) -> Tensor:
    return group_norm_silu(norm, x) if zq is None else norm(x, zq, act="silu")[0]


def residual_block_forward(
    self, inputs: Tensor, temb: Tensor | None = None, zq: Tensor | None = None, conv_cache: Cache = None
):
    if temb is not None or (zq is None) != isinstance(self.norm1, nn.GroupNorm):
        return original(self, inputs, temb, zq, conv_cache)
    old, new = conv_cache or {}, {}
    shortcut = inputs
    if self.in_channels != self.out_channels:
        if self.use_conv_shortcut:
            shortcut, new["conv_shortcut"] = self.conv_shortcut(inputs, conv_cache=old.get("conv_shortcut"))
        else:
            shortcut = self.conv_shortcut(inputs)
    y, new["conv1"] = self.conv1(normed(self.norm1, inputs, zq), conv_cache=old.get("conv1"))
    y, new["conv2"] = self.conv2(normed(self.norm2, y, zq), conv_cache=old.get("conv2"), residual=shortcut)
    return y, new


def upsample_forward(self, inputs: Tensor) -> Tensor:
    """2x in H and W, then the convolution of each frame; its frames, not those before it, are repeated in time."""
    y, frames = upsampled(self.conv, inputs), inputs.shape[2]
    return nearest(y, (2, 1, 1), first_apart=frames % 2 == 1) if self.compress_time and frames > 1 else y


def downsample_forward(self, x: Tensor) -> Tensor:
    """The mean of each pair of frames (the first of an odd number apart), then the convolution of each frame."""
    if self.compress_time:
        first = x.shape[2] % 2
        pairs = torch.lerp(x[:, :, first::2], x[:, :, first + 1 :: 2], 0.5)
        x = torch.cat([x[:, :, :first], pairs], dim=2) if first else pairs
    return self.conv(x, padding=AFTER)


def encoder_forward(self, sample: Tensor, temb: Tensor | None = None, conv_cache: Cache = None):
    return ends(self, sample, None, [*numbered("down_block", self.down_blocks), middle(self)], temb, conv_cache or {})


def decoder_forward(self, sample: Tensor, temb: Tensor | None = None, conv_cache: Cache = None):
    return ends(self, sample, sample, [middle(self), *numbered("up_block", self.up_blocks)], temb, conv_cache or {})


def middle(coder: Any) -> tuple[str, nn.Module]:
    return "mid_block", coder.mid_block


def numbered(name: str, blocks: nn.ModuleList) -> Iterator[tuple[str, nn.Module]]:
    return ((f"{name}_{i}", block) for i, block in enumerate(blocks))


def ends(coder: Any, sample: Tensor, zq: Tensor | None, blocks: list, temb: Tensor | None, old: dict):
    """Everything between the first and the last convolution in channels_last_3d memory; zq as the decoder's norms."""
    new = {}
    x, new["conv_in"] = coder.conv_in(channels_last(sample), conv_cache=old.get("conv_in"))
    for key, block in blocks:
        x, new[key] = checkpointed(coder, block, x, temb, zq, old.get(key))
    x, new["conv_out"] = coder.conv_out(normed(coder.norm_out, x, zq), conv_cache=old.get("conv_out"))
    return x.contiguous(), new


for function in (
    cached_conv_forward,
    spatial_norm_forward,
    residual_block_forward,
    upsample_forward,
    downsample_forward,
    encoder_forward,
    decoder_forward,
):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------


def is_cached_conv(module: Any) -> bool:
    return has(module, "conv", "time_causal_padding", "pad_mode", "fake_context_parallel_forward")


def refuse_cached_convs(*modules: Any) -> str | None:
    for module in modules:
        if not is_cached_conv(module):
            return f"its convolution is a {type(module).__name__}, without a cache"
        if module.conv.stride[0] != 1 or set(module.conv.dilation) != {1}:
            return "its convolution has a stride or a dilation in time"
    return refuse_plain_convs(*(module.conv for module in modules))


def cached_conv_patches(*modules: Any) -> Iterator:
    for module in modules:
        yield module, "forward", cached_conv_forward
        yield module.conv, "forward", conv_forward


def is_spatial_norm(module: Any) -> bool:
    return has(module, "norm_layer", "conv_y", "conv_b") and is_cached_conv(module.conv_y)


def refuse_any_norms(*norms: Any) -> str | None:
    for norm in norms:
        if is_spatial_norm(norm):
            if (norm.conv_y.time_kernel_size, norm.conv_b.time_kernel_size) != (1, 1):
                return "its norm convolves over time"
            why = refuse_cached_convs(norm.conv_y, norm.conv_b) or refuse_group_norms(norm.norm_layer)
            why = why or unknown(norm, "norm_layer", "conv_y", "conv_b")
        else:
            why = refuse_group_norms(norm)
        if why is not None:
            return why
    return None


def norm_patches(*norms: Any) -> Iterator:
    for norm in norms:
        if is_spatial_norm(norm):
            yield norm, "forward", spatial_norm_forward
            yield from cached_conv_patches(norm.conv_y, norm.conv_b)


def absorbed(*norms: Any) -> list[nn.Module]:
    return [norm.norm_layer if is_spatial_norm(norm) else norm for norm in norms]


def norm_passes(norm: Any) -> int:
    """Over the channels before a convolution, spared: GroupNorm 3 and SiLU 2 against 3.

    A spatial norm makes two enlarged tables (2), multiplies (3) and adds (3), then SiLU 2; in place of it all 4.
    """
    return 6 if is_spatial_norm(norm) else 2


def refuse_residual_block(block: Any) -> str | None:
    if block.dropout.p > 0:
        return f"dropout p={block.dropout.p} between its norm and its convolution"
    why = None
    if block.in_channels != block.out_channels:
        refuse = refuse_cached_convs if block.use_conv_shortcut else refuse_plain_convs
        why = refuse(block.conv_shortcut)
    return (
        why
        or refuse_cached_convs(block.conv1, block.conv2)
        or refuse_any_norms(block.norm1, block.norm2)
        or refuse_activation(block.nonlinearity)
        or unknown(
            block, "nonlinearity", "norm1", "conv1", "temb_proj", "norm2", "dropout", "conv2", "conv_shortcut",
            "in_channels", "out_channels", "use_conv_shortcut",
        )
    )  # fmt: skip


def residual_block_patches(block: Any) -> Iterator:
    yield block, "forward", residual_block_forward
    yield from cached_conv_patches(block.conv1, block.conv2)
    yield from norm_patches(block.norm1, block.norm2)
    if block.in_channels != block.out_channels:
        if block.use_conv_shortcut:
            yield from cached_conv_patches(block.conv_shortcut)
        else:
            yield block.conv_shortcut, "forward", conv_forward


def residual_block_saving(block: Any) -> int:
    """And before each convolution: cat 2, padding 2; the residual 3 against 1."""
    before1, before2 = 4 + norm_passes(block.norm1), 4 + norm_passes(block.norm2)
    return (before1 * block.in_channels + (before2 + 2) * block.out_channels) * itemsize(block)


register(
    Kind(
        name="cached residual block (GroupNorm or spatial norm, SiLU, conv, twice)",
        ops=("norm_silu", "causal_conv3d", "next_cache"),
        match=lambda m: (
            has(m, "norm1", "conv1", "norm2", "conv2", "nonlinearity", "use_conv_shortcut") and is_cached_conv(m.conv1)
        ),
        refuse=refuse_residual_block,
        patches=residual_block_patches,
        absorbs=lambda block: [*absorbed(block.norm1, block.norm2), block.nonlinearity],
        saving=residual_block_saving,
        unit="pixel",
    )
)


def register_resampling(name: str, stride: int, forward: Callable, passes: int) -> None:
    register(
        Kind(
            name=name,
            ops=("causal_conv3d",),
            match=lambda m: (
                has(m, "conv", "compress_time") and isinstance(m.conv, nn.Conv2d) and m.conv.stride == (stride, stride)
            ),
            refuse=lambda m: refuse_plain_convs(m.conv) or unknown(m, "conv", "compress_time"),
            patches=lambda m: [(m, "forward", forward), (m.conv, "forward", conv_forward)],
            saving=lambda m: passes * m.conv.in_channels * itemsize(m),
            unit="pixel",
        )
    )


# passes: interpolate 1, cat 2, frames to the batch and back 4 against 2; half of the convolution where frames repeat
register_resampling("nearest upsampling (2x in space, frames repeated)", 1, upsample_forward, 5)
# passes: pixels to the batch and back 4, cat 2, padding 2, frames to the batch and back 4 against cat 2
register_resampling("downsampling (mean of two frames, 2x in space)", 2, downsample_forward, 10)


def register_side(side: str, blocks: str, forward: Callable) -> None:
    register(
        Kind(
            name=f"cached {side} (first and last convolution)",
            ops=("norm_silu", "causal_conv3d", "next_cache"),
            match=lambda m: (
                has(m, "conv_in", "mid_block", blocks, "norm_out", "conv_act", "conv_out") and is_cached_conv(m.conv_in)
            ),
            refuse=lambda m: (
                refuse_cached_convs(m.conv_in, m.conv_out)
                or refuse_any_norms(m.norm_out)
                or refuse_activation(m.conv_act)
                or unknown(
                    m, "conv_in", "mid_block", blocks, "norm_out", "conv_act", "conv_out", "gradient_checkpointing"
                )
            ),
            patches=lambda m: [
                (m, "forward", forward),
                *cached_conv_patches(m.conv_in, m.conv_out),
                *norm_patches(m.norm_out),
            ],
            absorbs=lambda m: [*absorbed(m.norm_out), m.conv_act],
            # passes: cat 2, padding 2 before both convolutions
            saving=lambda m: (
                (4 * m.conv_in.conv.in_channels + (4 + norm_passes(m.norm_out)) * m.conv_out.conv.in_channels)
                * itemsize(m)
            ),
            unit="pixel",
        )
    )


register_side("encoder", "down_blocks", encoder_forward)
register_side("decoder", "up_blocks", decoder_forward)
