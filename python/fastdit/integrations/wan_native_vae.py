"""WanVAE_ of Wan's own repositories (Wan 2.1, 2.2): residual blocks, encoder, decoder, the loops of encode and decode.

Its resampling and its attention are those of diffusers' AutoencoderKLWan, and so are the cache and its slots
(`diffusers_wan_vae`); here the same layers stand in nn.Sequential.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.integrations.diffusers_wan_vae import cached, causal_conv_forward
from fastdit.integrations.diffusers_wan_vae_loop import marked, upwards
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, is_causal_conv, itemsize, refuse_activation, refuse_convs, refuse_norms
from fastdit.integrations.vae_layers import channel_norm
from fastdit.models.vae import chunks, patchify, unpatchify
from fastdit.nn import channels_last

# Norm, SiLU, convolution ------------------------------------------------------------------------------------------


def residual_block_forward(self, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
    norm1, _, conv1, norm2, _, _, conv2 = self.residual
    shortcut = self.shortcut(x)
    y = cached(conv1, x, feat_cache, feat_idx, **channel_norm(norm1), act="silu")
    return cached(conv2, y, feat_cache, feat_idx, **channel_norm(norm2), act="silu", residual=shortcut)


def refuse_residual_block(block: Any) -> str | None:
    norm1, act1, conv1, norm2, act2, dropout, conv2 = block.residual
    shortcut = [] if isinstance(block.shortcut, nn.Identity) else [block.shortcut]
    if type(dropout) is not nn.Dropout or dropout.p > 0:
        return "its dropout is not zero"
    return (
        refuse_convs(conv1, conv2, *shortcut)
        or refuse_norms(norm1, norm2)
        or refuse_activation(act1)
        or refuse_activation(act2)
    )


def convs(*modules: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    return ((m, "forward", causal_conv_forward) for m in modules if not isinstance(m, nn.Identity))


register(
    Kind(
        name="causal residual block (Wan-Video)",
        ops=("causal_conv3d", "next_cache"),
        match=lambda m: (
            has(m, "residual", "shortcut")
            and isinstance(m.residual, nn.Sequential)
            and len(m.residual) == 7
            and is_causal_conv(m.residual[2])
        ),
        refuse=refuse_residual_block,
        patches=lambda m: [
            (m, "forward", residual_block_forward),
            *convs(m.residual[2], m.residual[6], m.shortcut),
        ],
        absorbs=lambda m: [m.residual[i] for i in (0, 1, 3, 4, 5)],
        # as diffusers' block: 15 passes before each convolution, 2 for the sum
        saving=lambda m: (
            (15 * (m.residual[2].in_channels + m.residual[6].in_channels) + 2 * m.residual[6].in_channels) * itemsize(m)
        ),
        unit="pixel",
    )
)


# Encoder and decoder ----------------------------------------------------------------------------------------------


def head(side: Any, x: Tensor, feat_cache, feat_idx) -> Tensor:
    norm, _, conv = side.head
    return cached(conv, x, feat_cache, feat_idx, **channel_norm(norm), act="silu")


def through(layers: Any, x: Tensor, feat_cache, feat_idx) -> Tensor:
    """Layers with a cache get it, attentions do not."""
    for layer in layers:
        x = layer(x) if hasattr(layer, "to_qkv") else layer(x, feat_cache=feat_cache, feat_idx=feat_idx)
    return x


def encoder_forward(self, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
    x = cached(self.conv1, channels_last(x), feat_cache, feat_idx)
    x = through(self.middle, through(self.downsamples, x, feat_cache, feat_idx), feat_cache, feat_idx)
    return head(self, x, feat_cache, feat_idx).contiguous()


def decoder_forward(self, x: Tensor, feat_cache=None, feat_idx=None, first_chunk: bool = False) -> Tensor:
    x = cached(self.conv1, channels_last(x), feat_cache, feat_idx)
    x = through(self.middle, x, feat_cache, feat_idx)
    layers = list(self.upsamples)
    return upwards(
        layers, lambda x: head(self, x, feat_cache, feat_idx), x, feat_cache, feat_idx, first_chunk
    ).contiguous()


def register_side(side: str, layers: str, forward: Any) -> None:
    register(
        Kind(
            name=f"causal {side} (Wan-Video)",
            ops=("causal_conv3d", "next_cache"),
            match=lambda m: (
                has(m, "conv1", "middle", layers, "head")
                and is_causal_conv(m.conv1)
                and isinstance(m.head, nn.Sequential)
                and len(m.head) == 3
            ),
            refuse=lambda m: (
                refuse_convs(m.conv1, m.head[2]) or refuse_norms(m.head[0]) or refuse_activation(m.head[1])
            ),
            patches=lambda m: [(m, "forward", forward), *convs(m.conv1, m.head[2])],
            absorbs=lambda m: [m.head[0], m.head[1]],
            # passes: cat 2, pad 2 before the first convolution; as in a residual block before the last
            saving=lambda m: (4 * m.conv1.in_channels + 15 * m.head[2].in_channels) * itemsize(m),
            unit="pixel",
        )
    )


register_side("encoder", "downsamples", encoder_forward)
register_side("decoder", "upsamples", decoder_forward)


# The loops over time, without the concatenation in every step -------------------------------------------------------


def broadcast(scale: Sequence[Any]) -> tuple[Any, ...]:
    """(mean, 1 / std) of the latents' channels, or two numbers."""
    return tuple(s.view(1, -1, 1, 1, 1) if isinstance(s, Tensor) else s for s in scale)


def patch_size(channels: int) -> int:
    """Wan 2.2 codes 2 x 2 patches of its three colours."""
    return math.isqrt(channels // 3)


def encode(self, x: Tensor, scale: Sequence[Any]) -> Tensor:
    self.clear_cache()
    x = patchify(x, patch_size(self.encoder.conv1.in_channels))
    whole = 1 + (x.shape[2] - 1) // 4 * 4  # as the original: frames that fill no latent frame are dropped
    latents = []
    for start, stop in chunks(whole, 4):
        self._enc_conv_idx = [0]
        latents.append(self.encoder(x[:, :, start:stop], feat_cache=self._enc_feat_map, feat_idx=self._enc_conv_idx))
    mean = self.conv1(torch.cat(latents, dim=2)).chunk(2, dim=1)[0]
    self.clear_cache()
    shift, factor = broadcast(scale)
    return (mean - shift) * factor


def decode(self, z: Tensor, scale: Sequence[Any]) -> Tensor:
    self.clear_cache()
    shift, factor = broadcast(scale)
    x = self.conv2(z / factor + shift)
    frames = []
    for start, stop in chunks(x.shape[2], 1):
        self._conv_idx = [0]
        first = marked(self.decoder, start == 0)
        frames.append(self.decoder(x[:, :, start:stop], feat_cache=self._feat_map, feat_idx=self._conv_idx, **first))
    video = torch.cat(frames, dim=2)
    self.clear_cache()
    return unpatchify(video, patch_size(video.shape[1]))


register(
    Kind(
        name="loop over time (Wan-Video)",
        ops=("causal_conv3d",),
        match=lambda m: (
            has(m, "encoder", "decoder", "conv1", "conv2", "clear_cache", "encode", "decode")
            and is_causal_conv(m.conv2)
        ),
        refuse=lambda m: refuse_convs(m.conv1, m.conv2),
        patches=lambda m: [(m, "encode", encode), (m, "decode", decode), *convs(m.conv1, m.conv2)],
        unit="pixel",
    )
)

for function in (residual_block_forward, encoder_forward, decoder_forward):
    function.__name__ = "forward"
