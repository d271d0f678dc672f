"""diffusers' AutoencoderVidTok, causal or not: encoder and decoder, each whole.

The original cuts a video into images for one residual block and into the lines of its pixels for the next. Here it
stays one, in channels_last_3d memory, and the layers are called with that. Causal convolutions keep their last input
frames in their own `causal_cache`, before the SiLU that is fused into them, where the original keeps the whole input
behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_allegro_vae import downsample_forward, upsample_forward
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, refuse_activation, unknown
from fastdit.integrations.vae_layers import checkpointed, conv_forward, layer_norm, nearest, refuse_plain_convs
from fastdit.integrations.vae_moves import pixels, video
from fastdit.nn import channels_last, last_frames

# Layers: called with videos ---------------------------------------------------------------------------------------


def causal_conv_forward(self, x: Tensor, **fused) -> Tensor:
    """conv([causal_cache, x]); the first chunk repeats its first frame. The last `cache_offset` frames come again."""
    if x.ndim != 5:
        return original(self, x)
    kept = None if self.is_first_chunk else self.causal_cache
    frames, cache, before = x, kept, self.time_pad
    if kept is not None and x.shape[2] % self.conv.stride[0] != 0:  # the original drops the odd frame, the op would not
        frames, cache, before = torch.cat([kept, x], dim=2), None, 0
    w0, w1, h0, h1 = getattr(self, "spatial_padding", (0,) * 6)[:4]
    y = self.conv(frames, padding=(before, 0, h0, h1, w0, w1), time_pad="first", cache=cache, **fused)
    if self.time_pad > 0:
        self.causal_cache = last_frames(x[:, :, : max(x.shape[2] - self.cache_offset, 0)], kept, self.time_pad + 1)
    return y


def residual_block_forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
    if x.ndim != 5 or temb is not None:
        return original(self, x, temb)
    shortcut = x
    if self.in_channels != self.out_channels:
        shortcut = (self.conv_shortcut if self.use_conv_shortcut else self.nin_shortcut)(x)
    y = self.conv1(layer_norm(self.norm1.norm, x), act="silu")
    return self.conv2(layer_norm(self.norm2.norm, y), act="silu", residual=shortcut)


def attention_forward(self, x: Tensor) -> Tensor:
    """Over the pixels of each frame, one head."""
    h = layer_norm(self.norm.norm, x)
    q, k, v = (pixels(layer(h)).flatten(2, 3).flatten(0, 1).unsqueeze(2) for layer in (self.q, self.k, self.v))
    y = ops.attention(q, k, v).squeeze(2)  # (B * T, H * W, C)
    return self.proj_out(video(y.unflatten(1, x.shape[3:]).unflatten(0, (x.shape[0], -1))), residual=x)


def temporal_downsample_forward(self, x: Tensor) -> Tensor:
    """The mean of three frames beside a convolution of three, every other frame."""
    if self.is_causal:
        frames = torch.cat([x[:, :, :1] if self.is_first_chunk else self.causal_cache, x], dim=2)
        self.causal_cache = frames[:, :, -1:].clone()
        y = self.conv(x)
    else:
        frames = F.pad(x, (0, 0, 0, 0, 0, 1))
        y = self.conv(x, padding=(0, 1, 1, 1, 1, 1))
    return mixed(self, video(pixels(frames).unfold(1, 3, 2).mean(-1)), y)


def temporal_upsample_forward(self, x: Tensor) -> Tensor:
    """Frames twice, in between each other where causal, beside their convolution."""
    if not self.is_causal:
        x = nearest(x, (2, 1, 1), first_apart=False)
    elif not self.enable_cached:
        x = between(x)
    elif self.is_first_chunk:
        n = self.num_temp_upsample
        self.causal_cache = x[:, :, -n:].clone()
        x = torch.cat([between(part) for part in (x[:, :, :n], x[:, :, n:]) if part.shape[2] > 0], dim=2)
    else:
        n, x = self.num_temp_upsample, torch.cat([self.causal_cache, x], dim=2)
        self.causal_cache = x[:, :, -2 * n : -n].clone()
        x = between(x)[:, :, 2 * n :]
    return mixed(self, x, self.conv(x))


def between(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=(2.0, 1.0, 1.0), mode="trilinear")


def mixed(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.lerp(y, x, torch.sigmoid(layer.mix_factor).to(x.dtype))


# Both ends --------------------------------------------------------------------------------------------------------


def middle(side: Any, x: Tensor) -> Tensor:
    x = checkpointed(side, side.mid.block_1, x, None)
    x = checkpointed(side, side.mid.attn_1, x)
    return checkpointed(side, side.mid.block_2, x, None)


def level(side: Any, x: Tensor, images: Any, lines: Any, sampler: str) -> Tensor:
    """Blocks of images and of lines in turns, then resampling in space, and in time only where there is some."""
    for block in (block for pair in zip(images.block, lines.block, strict=True) for block in pair):
        x = checkpointed(side, block, x, None)
    if not hasattr(images, sampler):
        return x
    x = checkpointed(side, getattr(images, sampler), x)
    return checkpointed(side, getattr(lines, sampler), x) if hasattr(lines, sampler) else x


def last(side: Any, x: Tensor) -> Tensor:
    return side.conv_out(layer_norm(side.norm_out.norm, x), act="silu").contiguous()


def encoder_forward(self, x: Tensor) -> Tensor:
    x = self.conv_in(channels_last(x))
    for images, lines in zip(self.down, self.down_temporal, strict=True):
        x = level(self, x, images, lines, "downsample")
    return last(self, middle(self, x))


def decoder_forward(self, z: Tensor) -> Tensor:
    x = middle(self, self.conv_in(channels_last(z)))
    for images, lines in zip(reversed(self.up), reversed(self.up_temporal), strict=True):
        x = level(self, x, images, lines, "upsample")
    return last(self, x)


for function in (
    causal_conv_forward,
    residual_block_forward,
    attention_forward,
    temporal_downsample_forward,
    temporal_upsample_forward,
    encoder_forward,
    decoder_forward,
):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------

CACHED = ("is_first_chunk", "causal_cache")
CONV = ("conv", "time_pad", "cache_offset", *CACHED)
BLOCK = ("norm1", "conv1", "norm2", "conv2", "nonlinearity", "in_channels", "out_channels", "use_conv_shortcut")
ATTENTION = ("norm", "q", "k", "v", "proj_out")
SIDE = ("conv_in", "mid", "norm_out", "conv_out", "nonlinearity", "num_resolutions", "num_res_blocks")
NORMS = ("norm1", "norm2", "norm_out", "norm")  # by their names in blocks and ends


def is_causal_conv(module: Any) -> bool:
    return has(module, *CONV)


def refuse_conv(conv: Any) -> str | None:
    if not is_causal_conv(conv):
        return refuse_plain_convs(conv)
    if getattr(conv, "pad_mode", "constant") != "constant" or any(conv.conv.padding):
        return "its convolution pads space otherwise than with zeros, or pads twice"
    return unknown(conv, *CONV, "spatial_padding", "pad_mode") or refuse_plain_convs(conv.conv)


def refuse_norm(norm: Any) -> str | None:
    if not has(norm, "norm") or type(norm.norm) is not nn.LayerNorm:
        return f"its norm is a {type(norm).__name__}, not a LayerNorm of channels"
    return unknown(norm, "norm")


def refuse_block(block: Any) -> str | None:
    if not has(block, *BLOCK):
        return f"its residual block is a {type(block).__name__}"
    if block.dropout.p > 0:
        return f"dropout p={block.dropout.p} between its norm and its convolution"
    known = unknown(block, *BLOCK, "dropout", "temb_proj", "conv_shortcut", "nin_shortcut")
    return known or refuse_activation(block.nonlinearity)


def refuse_attention(attn: Any) -> str | None:
    return unknown(attn, *ATTENTION) if has(attn, *ATTENTION) else f"its attention is a {type(attn).__name__}"


def refuse_sampler(sampler: Any) -> str | None:
    if has(sampler, "mix_factor", "is_causal", "conv"):
        known = ("conv", "mix_factor", "is_causal", "avg_pool", "enable_cached", "interpolation_mode")
        return unknown(sampler, *known, "num_temp_upsample", *CACHED)
    if not isinstance(getattr(sampler, "conv", None), nn.Conv2d):
        return f"its resampling is a {type(sampler).__name__}"
    if (sampler.conv.stride, sampler.conv.padding) not in (((1, 1), (1, 1)), ((2, 2), (0, 0))):
        return "its resampling pads or strides otherwise"
    return unknown(sampler, "conv")


def levels_of(side: Any) -> Iterator[Any]:
    for name in ("down", "down_temporal", "up", "up_temporal"):
        yield from getattr(side, name, ())


def blocks_of(side: Any) -> list[Any]:
    return [side.mid.block_1, side.mid.block_2, *(block for level in levels_of(side) for block in level.block)]


def samplers_of(side: Any) -> list[Any]:
    return [m for level in levels_of(side) for name, m in level.named_children() if name in ("downsample", "upsample")]


def convs_of(side: nn.Module) -> list[Any]:
    """Its convolutions: causal ones, and plain ones in no causal one."""
    causal = [m for m in side.modules() if is_causal_conv(m)]
    inner = {m.conv for m in causal}
    plain = [m for m in side.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and m not in inner]
    return causal + plain


def norms_of(side: Any) -> list[Any]:
    owners = (side, side.mid.attn_1, *blocks_of(side))
    return [getattr(owner, name) for owner in owners for name in NORMS if hasattr(owner, name)]


def refuse(side: Any, *parts: str) -> str | None:
    reasons = (
        unknown(side, *SIDE, *parts, "gradient_checkpointing"),
        refuse_activation(side.nonlinearity),
        unknown(side.mid, "block_1", "attn_1", "block_2"),
        *(unknown(level, "block", "attn", "downsample", "upsample") for level in levels_of(side)),
        *map(refuse_block, blocks_of(side)),
        refuse_attention(side.mid.attn_1),
        *map(refuse_sampler, samplers_of(side)),
        *map(refuse_conv, convs_of(side)),
        *map(refuse_norm, norms_of(side)),
    )
    return next((why for why in reasons if why is not None), None)


def sampler_forward(sampler: Any) -> Callable:
    if not has(sampler, "mix_factor"):
        return upsample_forward if sampler.conv.stride == (1, 1) else downsample_forward
    return temporal_downsample_forward if has(sampler, "avg_pool") else temporal_upsample_forward


def patches(side: Any, forward: Callable) -> Iterator:
    yield side, "forward", forward
    yield side.mid.attn_1, "forward", attention_forward
    yield from ((block, "forward", residual_block_forward) for block in blocks_of(side))
    yield from ((sampler, "forward", sampler_forward(sampler)) for sampler in samplers_of(side))
    for conv in convs_of(side):
        if is_causal_conv(conv):
            yield conv, "forward", causal_conv_forward
        yield getattr(conv, "conv", conv), "forward", conv_forward


def absorbed(side: Any) -> Iterator[nn.Module]:
    yield from (m for m in side.modules() if isinstance(m, (nn.SiLU, nn.Dropout, nn.AvgPool3d)))
    for norm in norms_of(side):
        yield from (norm, norm.norm)


def saving(side: Any) -> int:
    # passes before a convolution: silu 2, half of the video cut anew 2; before a causal one cat 2, the kept input 2
    channels = [(getattr(conv, "conv", conv).in_channels, is_causal_conv(conv)) for conv in convs_of(side)]
    return sum((7 if causal else 3) * width for width, causal in channels) * itemsize(side)


def register_side(side: str, forward: Callable, *parts: str) -> None:
    register(
        Kind(
            name=f"VidTok {side} (residual blocks of images and of lines, attention, resampling)",
            ops=("norm_modulate", "causal_conv3d", "next_cache", "attention"),
            match=lambda m: has(m, *SIDE, *parts),
            refuse=lambda m: refuse(m, *parts),
            patches=lambda m: patches(m, forward),
            absorbs=absorbed,
            saving=saving,
            unit="pixel",
        )
    )


register_side("encoder", encoder_forward, "down", "down_temporal", "spatial_ds", "tempo_ds")
register_side("decoder", decoder_forward, "up", "up_temporal", "spatial_us", "tempo_us")
