"""diffusers' AutoencoderKLKVAE, the VAE of single images: residual blocks, resampling by pixels, both ends.

An image is a video of one frame here, which moves nothing. Between the ends images are in channels_last memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fastdit.integrations.diffusers_kvae import (
    doubled,
    halved,
    is_spatial_norm,
    norm_passes,
    refuse_levels,
    refuse_spatial_norm,
)
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, parameters, refuse_activation, unknown
from fastdit.integrations.vae_layers import (
    checkpointed,
    conv_forward,
    group_norm_silu,
    refuse_group_norms,
    refuse_plain_convs,
    spatial_norm,
)
from fastdit.nn import channels_last

REPEATED = dict(space_pad="replicate")


def frame(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, H, W)."""
    return channels_last(x.unsqueeze(2))


def normed(norm: Any, x: Tensor, zq: Tensor | None) -> Tensor:
    """silu(norm(x)), in a decoder modulated by the latents zq; both of one frame."""
    if zq is None:
        return group_norm_silu(norm, x)
    return spatial_norm(norm.norm_layer, x, norm.conv_y(zq), norm.conv_b(zq), first_apart=False, act="silu")


def block_forward(self, x: Tensor, temb: Tensor | None, zq: Tensor | None = None) -> Tensor:
    if temb is not None:
        return original(self, x, temb, zq)
    x, zq = frame(x), None if zq is None else frame(zq)
    shortcut = x
    for conv in shortcut_convs(self):
        shortcut = conv(x, **REPEATED)
    y = self.conv1(normed(self.norm1, x, zq), **REPEATED)
    return self.conv2(normed(self.norm2, y, zq), **REPEATED, residual=shortcut).squeeze(2)


def downsample_forward(self, x: Tensor) -> Tensor:
    return self.linear(halved(self, frame(x))).squeeze(2)


def upsample_forward(self, x: Tensor) -> Tensor:
    return self.linear(doubled(self, frame(x))).squeeze(2)


def encoder_forward(self, x: Tensor) -> Tensor:
    h = self.conv_in(frame(x)).squeeze(2)
    for i, level in enumerate(self.down):
        for block in level.block:
            h = checkpointed(self, block, h, None)
        if i != self.num_resolutions - 1:
            h = level.downsample(h)
    h = checkpointed(self, self.mid.block_1, h, None)
    h = checkpointed(self, self.mid.block_2, h, None)
    return self.conv_out(normed(self.norm_out, frame(h), None)).squeeze(2).contiguous()


def decoder_forward(self, z: Tensor) -> Tensor:
    z = frame(z)
    zq = z.squeeze(2)
    h = self.conv_in(z, **REPEATED).squeeze(2)
    h = checkpointed(self, self.mid.block_1, h, None, zq)
    h = checkpointed(self, self.mid.block_2, h, None, zq)
    for i in reversed(range(self.num_resolutions)):
        for block in self.up[i].block:
            h = checkpointed(self, block, h, None, zq)
        if i != 0:
            h = self.up[i].upsample(h)
    return self.conv_out(normed(self.norm_out, frame(h), z), **REPEATED).squeeze(2).contiguous()


for function in (block_forward, downsample_forward, upsample_forward, encoder_forward, decoder_forward):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------


def refuse_norms(*norms: Any) -> str | None:
    for norm in norms:
        spatial = is_spatial_norm(norm)
        why = refuse_spatial_norm(norm) if spatial else None
        why = why or refuse_group_norms(norm.norm_layer if spatial else norm)
        if why is not None:
            return why
    return None


def absorbed(*norms: Any) -> Iterator[nn.Module]:
    for norm in norms:
        yield from (norm, norm.norm_layer) if is_spatial_norm(norm) else (norm,)


def patches(owner: Any, forward: Callable, convs: list[Any], *norms: Any) -> Iterator:
    """Of a module that calls these convolutions and those beside its norms."""
    yield owner, "forward", forward
    for norm in filter(is_spatial_norm, norms):
        convs = [*convs, norm.conv_y, norm.conv_b]
    for conv in convs:
        yield conv, "forward", conv_forward


BLOCK = ("norm1", "conv1", "norm2", "conv2", "nonlinearity", "in_channels", "out_channels", "use_conv_shortcut")


def shortcut_convs(block: Any) -> list[Any]:
    """Of a block that changes the width: of 3 x 3 pixels or of one, in which no border is seen."""
    if block.in_channels == block.out_channels:
        return []
    return [block.conv_shortcut if block.use_conv_shortcut else block.nin_shortcut]


def refuse_block(block: Any) -> str | None:
    return (
        unknown(block, *BLOCK, "temb_proj", "conv_shortcut", "nin_shortcut")
        or refuse_activation(block.nonlinearity)
        or refuse_plain_convs(block.conv1, block.conv2, borders="replicate")
        or refuse_plain_convs(*shortcut_convs(block), borders="replicate" if block.use_conv_shortcut else "zeros")
        or refuse_norms(block.norm1, block.norm2)
    )


register(
    Kind(
        name="KVAE image block (GroupNorm or spatial norm, SiLU, conv, twice)",
        ops=("norm_silu", "causal_conv3d"),
        match=lambda m: has(m, *BLOCK) and parameters(m) == ["x", "temb", "zq"],
        refuse=refuse_block,
        patches=lambda m: patches(m, block_forward, [m.conv1, m.conv2, *shortcut_convs(m)], m.norm1, m.norm2),
        absorbs=lambda m: [*absorbed(m.norm1, m.norm2), m.nonlinearity],
        # passes before each convolution: padding 2; the residual 3 against 1
        saving=lambda m: (
            ((2 + norm_passes(m.norm1)) * m.in_channels + (4 + norm_passes(m.norm2)) * m.out_channels) * itemsize(m)
        ),
        unit="pixel",
    )
)


def register_resampling(name: str, forward: Callable, passes: int, idle: str) -> None:
    """idle: the child that the original moves pixels with."""
    parts = ("spatial_conv", "linear", "factor", idle)
    register(
        Kind(
            name=name,
            ops=("causal_conv3d",),
            match=lambda m: has(m, *parts) and parameters(m) == ["x"],
            refuse=lambda m: (
                unknown(m, *parts)
                or ("its factor is not 2" if m.factor != 2 else None)
                or refuse_plain_convs(m.spatial_conv, borders="reflect")
                or refuse_plain_convs(m.linear)
            ),
            patches=lambda m: patches(m, forward, [m.spatial_conv, m.linear]),
            absorbs=lambda m: [getattr(m, idle)],
            saving=lambda m: passes * m.linear.in_channels * itemsize(m),
            unit="pixel",
        )
    )


# passes over the large picture: pixels to the channels 2, mirrored borders 2
register_resampling("KVAE image downsampling (convolution + mean)", downsample_forward, 4, "unshuffle")
# passes over the large picture: channels repeated 2 and shuffled 2, mirrored borders 2, the residual 3 against 1
register_resampling("KVAE image upsampling (repeated + its convolution)", upsample_forward, 8, "shuffle")

SIDE = ("conv_in", "mid", "norm_out", "conv_out", "nonlinearity", "num_resolutions", "num_res_blocks")


def refuse_side(side: Any, levels: str, borders: str) -> str | None:
    if getattr(side, "give_pre_end", False):
        return "it ends before its last norm"
    return (
        unknown(side, *SIDE, levels, "gradient_checkpointing", "give_pre_end", "last_z_shape")  # the last: only set
        or refuse_activation(side.nonlinearity)
        or refuse_levels(side, getattr(side, levels))
        or refuse_plain_convs(side.conv_in, side.conv_out, borders=borders)
        or refuse_norms(side.norm_out)
    )


def register_side(side: str, levels: str, forward: Callable, call: str, borders: str) -> None:
    register(
        Kind(
            name=f"KVAE image {side} (first and last convolution)",
            ops=("norm_silu", "causal_conv3d"),
            match=lambda m: has(m, *SIDE, levels) and parameters(m) == [call] and isinstance(m.conv_in, nn.Conv2d),
            refuse=lambda m: refuse_side(m, levels, borders),
            patches=lambda m: patches(m, forward, [m.conv_in, m.conv_out], m.norm_out),
            absorbs=lambda m: [*absorbed(m.norm_out), m.nonlinearity],
            saving=lambda m: norm_passes(m.norm_out) * m.conv_out.in_channels * itemsize(m),
            unit="pixel",
        )
    )


register_side("encoder", "down", encoder_forward, "x", "zeros")
register_side("decoder", "up", decoder_forward, "z", "replicate")
