"""diffusers' AutoencoderKLCosmos: residual blocks of factorised convolutions, resampling, both ends.

Time is padded with the first frame; GroupNorm is per frame where it has one group. Between the first and the last
convolution videos are in channels_last_3d memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.integrations.diffusers_cosmos_patches import patch_forward, refuse_patches, unpatch_forward
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, unknown
from fastdit.integrations.vae_layers import (
    checkpointed,
    conv_forward,
    group_norm_silu,
    nearest,
    refuse_group_norms,
)
from fastdit.integrations.vae_moves import of_frames
from fastdit.models.vae import AFTER
from fastdit.nn import channels_last

# Convolutions and norms -------------------------------------------------------------------------------------------


def causal_conv_forward(self, hidden_states: Tensor, *, padding: Any = None, residual: Tensor | None = None) -> Tensor:
    """CosmosCausalConv3d, which is an nn.Conv3d: conv(hidden_states) + residual."""
    padding = padding or (self.temporal_pad, 0, *self.spatial_pad)
    return conv_forward(self, hidden_states, padding=padding, time_pad="first", residual=residual)


def projection_forward(self, hidden_states: Tensor, *, residual: Tensor | None = None) -> Tensor:
    return self.conv_t(self.conv_s(hidden_states), residual=residual)


def normed(function: Callable[[nn.GroupNorm, Tensor], Tensor], norm: Any, x: Tensor) -> Tensor:
    return of_frames(function, norm.norm, x) if norm.num_groups == 1 else function(norm.norm, x)


def residual_block_forward(self, hidden_states: Tensor) -> Tensor:
    shortcut = self.conv_shortcut(hidden_states)
    y = self.conv1(normed(group_norm_silu, self.norm1, hidden_states))
    return self.conv2(normed(group_norm_silu, self.norm2, y), residual=shortcut)


def downsample_forward(self, hidden_states: Tensor) -> Tensor:
    """conv(x) + means of x, in space, then in time, where the first frame counts twice."""
    x = hidden_states
    if self.spatial_downsample:
        x = self.conv1(x, padding=AFTER, residual=x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).mean((4, 6)))
    if self.temporal_downsample:
        pairs = (x.shape[2] - 1) // 2
        means = x[:, :, 1 : 1 + 2 * pairs].unflatten(2, (pairs, 2)).mean(3)
        means = torch.cat([x[:, :, :1], means], dim=2)
        x = self.conv2(x, padding=(self.conv2.temporal_pad + 1, 0, 0, 0, 0, 0), residual=means)
    return self.conv3(x) if self.spatial_downsample or self.temporal_downsample else x


def upsample_forward(self, hidden_states: Tensor) -> Tensor:
    """h + conv(h) of the repeated frames (but the first), then of the enlarged pictures."""
    x = hidden_states
    if self.temporal_upsample:
        x = nearest(x, (2, 1, 1)) if x.shape[2] > 1 else x
        x = self.conv1(x, residual=x)
    if self.spatial_upsample:
        x = nearest(x, (1, 2, 2), first_apart=False)
        x = self.conv2(x, residual=x)
    return self.conv3(x) if self.spatial_upsample or self.temporal_upsample else x


# Both ends --------------------------------------------------------------------------------------------------------


def encoder_forward(self, hidden_states: Tensor) -> Tensor:
    x = self.conv_in(channels_last(self.patch_embed(hidden_states)))
    for block in (*self.down_blocks, self.mid_block):
        x = checkpointed(self, block, x)
    return self.conv_out(normed(group_norm_silu, self.norm_out, x)).contiguous()


def decoder_forward(self, hidden_states: Tensor) -> Tensor:
    x = self.mid_block(self.conv_in(channels_last(hidden_states)))
    for block in self.up_blocks:
        x = checkpointed(self, block, x)
    return self.unpatch_embed(self.conv_out(normed(group_norm_silu, self.norm_out, x)))


for function in (
    causal_conv_forward,
    projection_forward,
    residual_block_forward,
    downsample_forward,
    upsample_forward,
    encoder_forward,
    decoder_forward,
):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------


def is_causal_conv(module: Any) -> bool:
    return isinstance(module, nn.Conv3d) and has(module, "temporal_pad", "spatial_pad", "pad_mode")


def is_projection(module: Any) -> bool:
    return has(module, "conv_s", "conv_t") and is_causal_conv(module.conv_s) and is_causal_conv(module.conv_t)


def is_frame_norm(module: Any) -> bool:
    return has(module, "norm", "num_groups")


def convs_of(*modules: Any) -> Iterator[Any]:
    for module in modules:
        if is_projection(module):
            yield from (module.conv_s, module.conv_t)
        elif not isinstance(module, nn.Identity):
            yield module


def refuse_causal_convs(*modules: Any) -> str | None:
    for conv in convs_of(*modules):
        if not is_causal_conv(conv):
            return f"its convolution is a {type(conv).__name__}"
        if conv.pad_mode != "constant" or conv.groups != 1 or any(conv.padding) or len(set(conv.spatial_pad)) != 1:
            return "its convolution has groups or pads space otherwise than with zeros"
    return None


def refuse_frame_norms(*norms: Any) -> str | None:
    for norm in norms:
        why = unknown(norm, "norm", "num_groups") if is_frame_norm(norm) else f"its norm is a {type(norm).__name__}"
        if why is not None:
            return why
    return refuse_group_norms(*(norm.norm for norm in norms))


def conv_patches(*modules: Any) -> Iterator:
    for module in modules:
        if is_projection(module):
            yield module, "forward", projection_forward
    for conv in convs_of(*modules):
        yield conv, "forward", causal_conv_forward


def refuse_dropout(*dropouts: Any) -> str | None:
    return next((f"dropout p={dropout.p} inside" for dropout in dropouts if dropout.p > 0), None)


register(
    Kind(
        name="Cosmos residual block (GroupNorm of frames, SiLU, factorised conv, twice)",
        ops=("norm_silu", "causal_conv3d"),
        match=lambda m: has(m, "norm1", "conv1", "norm2", "conv2", "conv_shortcut") and is_projection(m.conv1),
        refuse=lambda m: (
            unknown(m, "norm1", "conv1", "norm2", "dropout", "conv2", "conv_shortcut")
            or refuse_dropout(m.dropout)
            or refuse_causal_convs(m.conv1, m.conv2, m.conv_shortcut)
            or refuse_frame_norms(m.norm1, m.norm2)
        ),
        patches=lambda m: [
            (m, "forward", residual_block_forward),
            *conv_patches(m.conv1, m.conv2, m.conv_shortcut),
        ],
        absorbs=lambda m: [m.norm1, m.norm1.norm, m.norm2, m.norm2.norm],
        # passes before each pair of convs: norm 3, silu 2 against 3, cat 2, padding 2, once more between the two 4
        saving=lambda m: (10 * m.conv1.conv_s.in_channels + 12 * m.conv1.conv_s.out_channels) * itemsize(m),
        unit="pixel",
    )
)


def register_resampling(name: str, word: str, forward: Callable) -> None:
    flags = (f"spatial_{word}", f"temporal_{word}")
    register(
        Kind(
            name=name,
            ops=("causal_conv3d",),
            match=lambda m: has(m, *flags, "conv1", "conv2", "conv3") and is_causal_conv(m.conv3),
            refuse=lambda m: (
                unknown(m, *flags, "conv1", "conv2", "conv3") or refuse_causal_convs(m.conv1, m.conv2, m.conv3)
            ),
            patches=lambda m: [(m, "forward", forward), *conv_patches(m.conv1, m.conv2, m.conv3)],
            # passes around each conv: cat 2, padding 2, residual 3 against 1
            saving=lambda m: 6 * (getattr(m, flags[0]) + getattr(m, flags[1])) * m.conv3.in_channels * itemsize(m),
            unit="pixel",
        )
    )


register_resampling("Cosmos downsampling (convolution + mean)", "downsample", downsample_forward)
register_resampling("Cosmos upsampling (repeated + its convolution)", "upsample", upsample_forward)


def register_side(side: str, forward: Callable, blocks: str, patches: str, patches_forward: Callable) -> None:
    parts = ("conv_in", "mid_block", "norm_out", "conv_out", blocks, patches)
    register(
        Kind(
            name=f"Cosmos {side} (first and last convolution, patches)",
            ops=("norm_silu", "causal_conv3d") + (("unpatchify3d",) if side == "decoder" else ()),
            match=lambda m: has(m, *parts) and is_projection(m.conv_in),
            refuse=lambda m: (
                unknown(m, *parts, "gradient_checkpointing")
                or refuse_causal_convs(m.conv_in, m.conv_out)
                or refuse_frame_norms(m.norm_out)
                or refuse_patches(getattr(m, patches))
            ),
            patches=lambda m: [
                (m, "forward", forward),
                (getattr(m, patches), "forward", patches_forward),
                *conv_patches(m.conv_in, m.conv_out),
            ],
            absorbs=lambda m: [m.norm_out, m.norm_out.norm],
            # passes: as in a residual block before the last convolutions; cat 2, padding 2 twice before the first
            saving=lambda m: (8 * m.conv_in.conv_s.in_channels + 10 * m.conv_out.conv_s.in_channels) * itemsize(m),
            unit="pixel",
        )
    )


register_side("encoder", encoder_forward, "down_blocks", "patch_embed", patch_forward)
register_side("decoder", decoder_forward, "up_blocks", "unpatch_embed", unpatch_forward)

register(
    Kind(
        name="Cosmos convolutions beside the latents",
        ops=("causal_conv3d",),
        match=lambda m: has(m, "encoder", "decoder", "quant_conv", "post_quant_conv") and is_causal_conv(m.quant_conv),
        refuse=lambda m: refuse_causal_convs(m.quant_conv, m.post_quant_conv),
        patches=lambda m: conv_patches(m.quant_conv, m.post_quant_conv),
        unit="pixel",
    )
)
