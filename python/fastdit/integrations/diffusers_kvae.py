"""diffusers' AutoencoderKLKVAEVideo: cached convolutions, residual blocks, resampling by pixels, both ends.

The caches are the original's dicts, with the same keys and life time: one call of encode or decode. A convolution keeps
its last input frames, without the border that the original pads them with; the first chunk repeats its first frame, and
stands apart where frames are repeated. Between the ends videos are in channels_last_3d memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, parameters, unknown
from fastdit.integrations.vae_layers import (
    checkpointed,
    conv_forward,
    group_norm_silu,
    nearest,
    refuse_group_norms,
    refuse_plain_convs,
    spatial_norm,
)
from fastdit.nn import channels_last, last_frames

Cache = dict[Any, Any]

# Convolutions and norms -------------------------------------------------------------------------------------------


def cached_conv_forward(self, input: Tensor, cache: Cache, *, residual: Tensor | None = None) -> Tensor:
    """conv([cache, x]) + residual; the frames that the next windows begin with become the cache."""
    x, kept, stride = input, cache["padding"], self.stride[0]
    before = self.time_pad if kept is None or stride == 1 else kept.shape[2]
    rows, columns = self.width_pad, self.height_pad  # as the original's F.pad takes them
    y = self.conv(
        x,
        padding=(before, 0, rows, rows, columns, columns),
        time_pad="first",
        space_pad="replicate",
        cache=kept,
        residual=residual,
    )
    cache["padding"] = last_frames(x, kept, before + x.shape[2] - stride * y.shape[2] + 1)
    return y


def spatial_norm_forward(self, f: Tensor, zq: Tensor, cache: Cache, *, act: str | None = None) -> Tensor:
    """act(GroupNorm(f) * conv_y(zq) + conv_b(zq)), zq enlarged to f's size; the cache says whether a chunk is first."""
    seen = cache["norm"]
    first = seen["mean"] is None and seen["var"] is None
    seen["mean"] = seen["var"] = 1
    return spatial_norm(self.norm_layer.norm_layer, f, self.conv_y(zq), self.conv_b(zq), first, act)


def normed(norm: Any, x: Tensor, zq: Tensor | None, cache: Cache) -> Tensor:
    """silu(norm(x))."""
    return group_norm_silu(norm.norm_layer, x) if zq is None else norm(x, zq, cache, act="silu")


# Blocks -----------------------------------------------------------------------------------------------------------


def residual_block_forward(self, x: Tensor, temb: Tensor | None, layer_cache: Cache, zq: Tensor | None = None):
    if temb is not None:
        return original(self, x, temb, layer_cache, zq)
    shortcut = x
    if self.in_channels != self.out_channels:
        if self.use_conv_shortcut:
            shortcut = self.conv_shortcut(x, layer_cache["conv_shortcut"])
        else:
            shortcut = self.nin_shortcut(x)
    y = self.conv1(normed(self.norm1, x, zq, layer_cache["norm1"]), layer_cache["conv1"])
    return self.conv2(normed(self.norm2, y, zq, layer_cache["norm2"]), layer_cache["conv2"], residual=shortcut)


def halved(self, x: Tensor) -> Tensor:
    """conv(x) + means of each 2 x 2 pixels."""
    means = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).mean((4, 6))
    return self.spatial_conv(x, space_pad="reflect", residual=means)


def doubled(self, x: Tensor) -> Tensor:
    """h + conv(h) of the enlarged pictures h."""
    x = nearest(x, (1, 2, 2), first_apart=False)
    return self.spatial_conv(x, space_pad="reflect", residual=x)


def downsample_forward(self, x: Tensor, cache: list[Cache]) -> Tensor:
    """conv(x) + means of x, of each 2 x 2 pixels, then of each two frames but the first; then a linear layer."""
    x = halved(self, x)
    if self.temporal_compress:
        single = int(cache[0]["padding"] is None)
        pairs = (x.shape[2] - single) // 2
        means = x[:, :, single : single + 2 * pairs].unflatten(2, (pairs, 2)).mean(3)
        means = torch.cat([x[:, :, :single], means], dim=2)
        x = self.temporal_conv(x, cache[0], residual=means)
    return self.linear(x)


def upsample_forward(self, x: Tensor, cache: Cache) -> Tensor:
    """h + conv(h) of the frames, each twice but the first and a single one, then of the enlarged pictures; linear."""
    if self.temporal_compress:
        x = nearest(x, (2, 1, 1), first_apart=cache["padding"] is None) if x.shape[2] > 1 else x
        x = self.temporal_conv(x, cache, residual=x)
    return self.linear(doubled(self, x))


def encoder_forward(self, x: Tensor, cache_dict: Cache) -> Tensor:
    h = self.conv_in(channels_last(x), cache_dict["conv_in"])
    for i, level in enumerate(self.down):
        for j, block in enumerate(level.block):
            h = checkpointed(self, block, h, None, cache_dict[i][j])
        if i != self.num_resolutions - 1:
            h = level.downsample(h, cache_dict[i]["down"])
    h = checkpointed(self, self.mid.block_1, h, None, cache_dict["mid_1"])
    h = checkpointed(self, self.mid.block_2, h, None, cache_dict["mid_2"])
    h = normed(self.norm_out, h, None, cache_dict["norm_out"])
    return self.conv_out(h, cache_dict["conv_out"]).contiguous()


def decoder_forward(self, z: Tensor, cache_dict: Cache) -> Tensor:
    zq = channels_last(z)
    h = self.conv_in(zq, cache_dict["conv_in"])
    h = checkpointed(self, self.mid.block_1, h, None, cache_dict["mid_1"], zq)
    h = checkpointed(self, self.mid.block_2, h, None, cache_dict["mid_2"], zq)
    for i in reversed(range(self.num_resolutions)):
        for j, block in enumerate(self.up[i].block):
            h = checkpointed(self, block, h, None, cache_dict[i][j], zq)
        if i != 0:
            h = self.up[i].upsample(h, cache_dict[i]["up"])
    h = normed(self.norm_out, h, zq, cache_dict["norm_out"])
    return self.conv_out(h, cache_dict["conv_out"]).contiguous()


for function in (
    cached_conv_forward,
    spatial_norm_forward,
    residual_block_forward,
    downsample_forward,
    upsample_forward,
    encoder_forward,
    decoder_forward,
):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------

PADS = ("time_pad", "height_pad", "width_pad")


def is_cached_conv(module: Any) -> bool:
    return has(module, "conv", "time_kernel_size", *PADS) and parameters(module) == ["input", "cache"]


def refuse_cached_convs(*modules: Any) -> str | None:
    for module in modules:
        if not is_cached_conv(module):
            return f"its convolution is a {type(module).__name__}, without a cache"
        if module.time_kernel_size != 3 or set(module.conv.dilation) != {1} or any(module.conv.padding):
            return "its convolution has another kernel or dilation in time, or pads twice"
    return refuse_plain_convs(*(module.conv for module in modules))


def cached_conv_patches(*modules: Any) -> Iterator:
    for module in modules:
        yield module, "forward", cached_conv_forward
        yield module.conv, "forward", conv_forward


def is_group_norm(norm: Any) -> bool:
    return has(norm, "norm_layer") and parameters(norm) == ["x", "cache"]


def is_spatial_norm(norm: Any) -> bool:
    return has(norm, "norm_layer", "conv_y", "conv_b", "add_conv")


def refuse_spatial_norm(norm: Any) -> str | None:
    """But for its GroupNorm."""
    if norm.add_conv:
        return "its norm convolves the latents first"
    return unknown(norm, "norm_layer", "conv_y", "conv_b", "add_conv") or refuse_plain_convs(norm.conv_y, norm.conv_b)


def refuse_norms(*norms: Any) -> str | None:
    for norm in norms:
        why = None
        if is_spatial_norm(norm):
            why = refuse_spatial_norm(norm)
            norm = norm.norm_layer
        if why is None and not is_group_norm(norm):
            why = f"its norm is a {type(norm).__name__}, not a GroupNorm with a cache"
        why = why or unknown(norm, "norm_layer") or refuse_group_norms(norm.norm_layer)
        if why is not None:
            return why
    return None


def norm_patches(*norms: Any) -> Iterator:
    for norm in norms:
        if is_spatial_norm(norm):
            yield norm, "forward", spatial_norm_forward
            yield norm.conv_y, "forward", conv_forward
            yield norm.conv_b, "forward", conv_forward


def absorbed(*norms: Any) -> Iterator[nn.Module]:
    for norm in norms:
        inner = norm.norm_layer
        yield from (inner, inner.norm_layer) if is_spatial_norm(norm) else (norm, inner)


def norm_passes(norm: Any) -> int:
    """Over the channels before a convolution, spared: GroupNorm 3 and SiLU 2 against 3.

    A spatial norm makes two enlarged tables (2), multiplies (3) and adds (3), then SiLU 2; in place of it all 4.
    """
    return 6 if is_spatial_norm(norm) else 2


BLOCK = ("norm1", "conv1", "norm2", "conv2", "in_channels", "out_channels", "use_conv_shortcut")


def shortcut_convs(block: Any, cached: bool) -> list[Any]:
    """Of a block that changes the width: its cached convolution, or the plain one of single pixels."""
    if block.in_channels == block.out_channels or block.use_conv_shortcut != cached:
        return []
    return [block.conv_shortcut if cached else block.nin_shortcut]


def residual_block_patches(block: Any) -> Iterator:
    yield block, "forward", residual_block_forward
    yield from cached_conv_patches(block.conv1, block.conv2, *shortcut_convs(block, cached=True))
    yield from norm_patches(block.norm1, block.norm2)
    for conv in shortcut_convs(block, cached=False):
        yield conv, "forward", conv_forward


register(
    Kind(
        name="KVAE residual block (GroupNorm or spatial norm, SiLU, conv, twice)",
        ops=("norm_silu", "causal_conv3d", "next_cache"),
        match=lambda m: has(m, *BLOCK) and is_cached_conv(m.conv1),
        refuse=lambda m: (
            unknown(m, *BLOCK, "temb_proj", "conv_shortcut", "nin_shortcut")
            or refuse_cached_convs(m.conv1, m.conv2, *shortcut_convs(m, cached=True))
            or refuse_plain_convs(*shortcut_convs(m, cached=False))
            or refuse_norms(m.norm1, m.norm2)
        ),
        patches=residual_block_patches,
        absorbs=lambda m: absorbed(m.norm1, m.norm2),
        # passes around each convolution: padding 2, its result copied 2; the residual 3 against 1
        saving=lambda m: (
            ((2 + norm_passes(m.norm1)) * m.in_channels + (8 + norm_passes(m.norm2)) * m.out_channels) * itemsize(m)
        ),
        unit="pixel",
    )
)


def register_resampling(name: str, forward: Callable, passes: int, *idle: str) -> None:
    """idle: children that the original makes its copies with."""
    parts = ("spatial_conv", "linear", "temporal_compress", "factor")

    def temporal(m: Any) -> list[Any]:
        return [m.temporal_conv] if m.temporal_compress else []

    register(
        Kind(
            name=name,
            ops=("causal_conv3d", "next_cache"),
            match=lambda m: has(m, *parts, *idle),
            refuse=lambda m: (
                unknown(m, *parts, *idle, "temporal_conv")
                or ("its factor is not 2" if m.factor != 2 else None)
                or refuse_plain_convs(m.spatial_conv, borders="reflect")
                or refuse_plain_convs(m.linear)
                or refuse_cached_convs(*temporal(m))
            ),
            patches=lambda m: [
                (m, "forward", forward),
                (m.spatial_conv, "forward", conv_forward),
                (m.linear, "forward", conv_forward),
                *cached_conv_patches(*temporal(m)),
            ],
            absorbs=lambda m: [getattr(m, name) for name in idle],
            saving=lambda m: passes * m.linear.in_channels * itemsize(m),
            unit="pixel",
        )
    )


# passes over the large picture: frames to the batch 2, pixels to the channels 2, mirrored borders 2
register_resampling("KVAE downsampling (convolution + mean)", downsample_forward, 6, "unshuffle", "s_pool")
# passes over the large picture: frames to the batch 2, mirrored borders 2, the residual 3 against 1, the copy 2
register_resampling("KVAE upsampling (repeated + its convolution)", upsample_forward, 8, "shuffle")

SIDE = ("conv_in", "mid", "norm_out", "conv_out", "num_resolutions", "num_res_blocks")


def refuse_levels(side: Any, levels: list[Any]) -> str | None:
    """What stands between the first and the last convolution, but for its blocks and resampling."""
    if any(len(level.attn) > 0 for level in levels):
        return "it has attention"
    reasons = (unknown(level, "block", "attn", "downsample", "upsample") for level in levels)
    return next(filter(None, reasons), None) or unknown(side.mid, "block_1", "block_2")


def refuse_side(side: Any, levels: str) -> str | None:
    return (
        unknown(side, *SIDE, levels, "gradient_checkpointing")
        or refuse_levels(side, getattr(side, levels))
        or refuse_cached_convs(side.conv_in, side.conv_out)
        or refuse_norms(side.norm_out)
    )


def register_side(side: str, levels: str, forward: Callable) -> None:
    register(
        Kind(
            name=f"KVAE {side} (first and last convolution)",
            ops=("norm_silu", "causal_conv3d", "next_cache"),
            match=lambda m: has(m, *SIDE, levels) and is_cached_conv(m.conv_in),
            refuse=lambda m: refuse_side(m, levels),
            patches=lambda m: [
                (m, "forward", forward),
                *cached_conv_patches(m.conv_in, m.conv_out),
                *norm_patches(m.norm_out),
            ],
            absorbs=lambda m: absorbed(m.norm_out),
            saving=lambda m: (
                (2 * m.conv_in.conv.in_channels + (2 + norm_passes(m.norm_out)) * m.conv_out.conv.in_channels)
                * itemsize(m)
            ),
            unit="pixel",
        )
    )


register_side("encoder", "down", encoder_forward)
register_side("decoder", "up", decoder_forward)
