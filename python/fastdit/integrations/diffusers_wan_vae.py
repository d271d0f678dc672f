"""diffusers' AutoencoderKLWan and its kin (Qwen-Image): causal convolutions, residual blocks, resampling, attention.

The feature cache keeps its slots and its life time; a slot holds the layer's last input frames as passed, before
norm and activation, because `causal_conv3d` applies both itself. Everything between the first and the last
convolution is in channels_last_3d memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import (
    has,
    is_causal_conv,
    itemsize,
    refuse_activation,
    refuse_convs,
    refuse_norms,
)
from fastdit.integrations.vae_layers import channel_norm, conv_forward
from fastdit.models.vae import AFTER, ONE_BEFORE
from fastdit.nn import frame_attention, last_frames, upsampled

# Convolutions: called with what is fused into them, and with nothing more by anybody else -------------------------


def causal_conv_forward(self, x: Tensor, cache_x: Tensor | None = None, *, padding=None, **fused) -> Tensor:
    """WanCausalConv3d: conv([cache_x, x]) without the padded and concatenated copies, with what is fused into it.

    QwenImage21CausalConv3d is its Conv2d of single frames; it takes no cache, as its own error says.
    """
    if self.weight.ndim == 4:
        if cache_x is not None or x.shape[2] != 1:
            return original(self, x, cache_x)
        w0, w1, h0, h1 = self._padding
        return conv_forward(self, x, padding=(0, 0, h0, h1, w0, w1), **fused)
    if padding is None:
        w0, w1, h0, h1, t0, t1 = self._padding
        padding = (t0, t1, h0, h1, w0, w1)
    cache = None if cache_x is None or padding[0] == 0 else cache_x.to(x.device)
    return conv_forward(self, x, padding=padding, cache=cache, **fused)


def cached(conv: Any, x: Tensor, feat_cache: list | None, feat_idx: list, **fused) -> Tensor:
    """One layer of the stream: use this layer's slot of the cache, refill it, move on to the next slot."""
    if feat_cache is None:
        return conv(x, **fused)
    cache = feat_cache[feat_idx[0]]
    y = conv(x, cache, **fused)
    feat_cache[feat_idx[0]] = last_frames(x, cache, conv.kernel_size[0] if conv.weight.ndim == 5 else 1)
    feat_idx[0] += 1
    return y


# Blocks -----------------------------------------------------------------------------------------------------------


def residual_block_forward(self, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
    shortcut = self.conv_shortcut(x)
    y = cached(self.conv1, x, feat_cache, feat_idx, **channel_norm(self.norm1), act="silu")
    return cached(self.conv2, y, feat_cache, feat_idx, **channel_norm(self.norm2), act="silu", residual=shortcut)


def attention_block_forward(self, x: Tensor) -> Tensor:
    qkv = self.to_qkv(x, **channel_norm(self.norm))
    return self.proj(frame_attention(qkv), residual=x)


def resample_forward(self, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
    conv = self.resample[1]
    if self.mode.startswith("upsample"):
        frames = 1
        if self.mode == "upsample3d" and feat_cache is not None:
            i = feat_idx[0]
            if feat_cache[i] is None:  # the first frame of a video stays one frame, and out of the time convolution
                feat_cache[i] = "Rep"
                feat_idx[0] += 1
            else:
                if isinstance(feat_cache[i], str):
                    feat_cache[i] = None
                x, frames = cached(self.time_conv, x, feat_cache, feat_idx), 2
        return upsampled(conv, x, frames)

    x = conv(x, padding=AFTER)
    if self.mode == "downsample3d" and feat_cache is not None:
        i = feat_idx[0]
        last, feat_cache[i] = feat_cache[i], ops.next_cache(x, None, 2)
        feat_idx[0] += 1
        if last is not None:
            x = self.time_conv(x, last, padding=ONE_BEFORE)
    return x


for function in (causal_conv_forward, residual_block_forward, attention_block_forward, resample_forward):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------


def refuse_residual_block(block: Any) -> str | None:
    if block.dropout.p > 0:
        return f"dropout p={block.dropout.p} between its norm and its convolution"
    shortcut = [] if isinstance(block.conv_shortcut, nn.Identity) else [block.conv_shortcut]
    return (
        refuse_convs(block.conv1, block.conv2, *shortcut)
        or refuse_norms(block.norm1, block.norm2)
        or refuse_activation(block.nonlinearity)
    )


def residual_block_patches(block: Any) -> Iterator:
    yield block, "forward", residual_block_forward
    for conv in (block.conv1, block.conv2, block.conv_shortcut):
        if not isinstance(conv, nn.Identity):
            yield conv, "forward", causal_conv_forward


register(
    Kind(
        name="causal residual block (norm, SiLU, conv, twice)",
        ops=("causal_conv3d", "next_cache"),
        match=lambda m: (
            has(m, "norm1", "conv1", "norm2", "conv2", "conv_shortcut", "nonlinearity", "dropout")
            and is_causal_conv(m.conv1)
        ),
        refuse=refuse_residual_block,
        patches=residual_block_patches,
        absorbs=lambda block: [block.norm1, block.norm2, block.nonlinearity],
        # passes before each conv: normalize 3, scale 2, gamma 2, bias 2, silu 2, cat 2, pad 2; residual 3 against 1
        saving=lambda block: (15 * (block.in_dim + block.out_dim) + 2 * block.out_dim) * itemsize(block),
        unit="pixel",
    )
)


def resample_patches(module: Any) -> Iterator:
    yield module, "forward", resample_forward
    yield module.resample[1], "forward", conv_forward
    if hasattr(module, "time_conv"):
        yield module.time_conv, "forward", causal_conv_forward


register(
    Kind(
        name="causal resampling (2x in space, 2x in time)",
        ops=("causal_conv3d", "next_cache"),
        match=lambda m: (
            isinstance(getattr(m, "resample", None), nn.Sequential)
            and len(m.resample) == 2
            and getattr(m, "mode", None) in ("upsample2d", "upsample3d", "downsample2d", "downsample3d")
        ),
        refuse=lambda m: refuse_convs(m.resample[1], *([m.time_conv] if hasattr(m, "time_conv") else [])),
        patches=resample_patches,
        absorbs=lambda m: [m.resample[0]],
        # passes around the time convolution: cat 2, pad 2, interleaving of twice the channels 4
        saving=lambda m: 8 * m.dim * itemsize(m) if hasattr(m, "time_conv") else 0,
        unit="pixel",
    )
)

register(
    Kind(
        name="frame attention of a VAE",
        ops=("causal_conv3d", "attention"),
        match=lambda m: (
            has(m, "norm", "to_qkv", "proj") and isinstance(m.to_qkv, nn.Conv2d) and hasattr(m.norm, "gamma")
        ),
        refuse=lambda m: refuse_convs(m.to_qkv, m.proj) or refuse_norms(m.norm),
        patches=lambda m: [
            (m, "forward", attention_block_forward),
            (m.to_qkv, "forward", conv_forward),
            (m.proj, "forward", conv_forward),
        ],
        absorbs=lambda m: [m.norm],
        # passes: normalize 3, scale 2, gamma 2, bias 2, transposed copies of q, k, v and of the output 8, residual 2
        saving=lambda m: 19 * m.dim * itemsize(m),
        unit="pixel",
    )
)
