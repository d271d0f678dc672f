"""diffusers' AutoencoderKLMochi: residual blocks, frame-causal attention of each pixel, resampling, both ends.

GroupNorm is per frame; time and space are padded with their borders. Everything between the first and the last
projection is in channels_last_3d memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_cogvideox_vae import Cache, cached_conv_patches, is_cached_conv, numbered
from fastdit.integrations.diffusers_processor import Processor, refuse_processor, shared
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, refuse_activation, unknown
from fastdit.integrations.vae_layers import (
    checkpointed,
    conv_forward,
    group_norm,
    group_norm_silu,
    refuse_group_norms,
    refuse_plain_convs,
)
from fastdit.integrations.vae_moves import depth_to_space, of_frames, pixels, video
from fastdit.nn import channels_last


def residual_block_forward(self, inputs: Tensor, conv_cache: Cache = None):
    old, new = conv_cache or {}, {}
    y = of_frames(group_norm_silu, self.norm1.norm_layer, inputs)
    y, new["conv1"] = self.conv1(y, conv_cache=old.get("conv1"))
    y = of_frames(group_norm_silu, self.norm2.norm_layer, y)
    y, new["conv2"] = self.conv2(y, conv_cache=old.get("conv2"), residual=inputs)
    return y, new


# Attention --------------------------------------------------------------------------------------------------------


class FastditMochiVaeProcessor(Processor):
    """MochiVaeAttnProcessor2_0 on (B, frames, pixels, C): each pixel sees itself in the frames up to its own.

    The projections read the video where it lies; a call with three dims goes to the original.
    """

    def __init__(self):
        from diffusers.models.attention_processor import MochiVaeAttnProcessor2_0

        super().__init__(MochiVaeAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if hidden_states.ndim != 4:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask)
        value = attn.to_v(hidden_states)
        if hidden_states.shape[1] > 1:
            query, key, value = (
                t.unflatten(-1, (attn.heads, -1)) for t in (attn.to_q(hidden_states), attn.to_k(hidden_states), value)
            )
            query = query if attn.norm_q is None else attn.norm_q(query)
            key = key if attn.norm_k is None else attn.norm_k(key)
            query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))  # (B*pixels, T, H, D)
            y = ops.attention(query, key, value, frame_tokens=1)
            value = y.unflatten(0, (-1, hidden_states.shape[2])).transpose(1, 2).flatten(3)
        return attn.to_out[1](attn.to_out[0](value))


def blocks_forward(self, hidden_states: Tensor, conv_cache: Cache = None, chunk_size: int = 2**15):
    """Residual blocks, each followed by attention; a downsampling block begins with its convolution."""
    if not all(isinstance(attn.processor, FastditMochiVaeProcessor) for attn in self.attentions if attn is not None):
        return original(self, hidden_states, conv_cache)
    x, old, new = hidden_states, conv_cache or {}, {}
    if hasattr(self, "conv_in"):
        x, new["conv_in"] = self.conv_in(x)
    for (key, resnet), norm, attn in zip(numbered("resnet", self.resnets), self.norms, self.attentions, strict=True):
        x, new[key] = checkpointed(self, resnet, x, old.get(key))
        if attn is not None:
            y = attn(pixels(of_frames(group_norm, norm.norm_layer, x)).flatten(2, 3))
            x = x + video(y.unflatten(2, x.shape[3:]))
    return x, new


# Resampling and both ends -----------------------------------------------------------------------------------------


def up_block_forward(self, hidden_states: Tensor, conv_cache: Cache = None):
    x, old, new = hidden_states, conv_cache or {}, {}
    for key, resnet in numbered("resnet", self.resnets):
        x, new[key] = checkpointed(self, resnet, x, old.get(key))
    s = self.spatial_expansion
    return depth_to_space(video(self.proj(pixels(x))), (self.temporal_expansion, s, s)), new


def encoder_forward(self, hidden_states: Tensor, conv_cache: Cache = None):
    old, new = conv_cache or {}, {}
    x = video(self.proj_in(pixels(self.fourier_features(hidden_states))))
    for key, block in (("block_in", self.block_in), *numbered("down_block", self.down_blocks)):
        x, new[key] = checkpointed(self, block, x, old.get(key))
    x, new["block_out"] = self.block_out(x, conv_cache=old.get("block_out"))
    return video(self.proj_out(pixels(of_frames(group_norm_silu, self.norm_out.norm_layer, x)))), new


def decoder_forward(self, hidden_states: Tensor, conv_cache: Cache = None):
    old, new = conv_cache or {}, {}
    x = self.conv_in(channels_last(hidden_states))
    for key, block in (("block_in", self.block_in), *numbered("up_block", self.up_blocks)):
        x, new[key] = checkpointed(self, block, x, old.get(key))
    x, new["block_out"] = self.block_out(x, conv_cache=old.get("block_out"))
    return video(self.proj_out(ops.activation(pixels(x), "silu"))), new


for function in (residual_block_forward, blocks_forward, up_block_forward, encoder_forward, decoder_forward):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------


SAMPLING = ("temporal_expansion", "spatial_expansion", "gradient_checkpointing")


def is_frame_norm(norm: Any) -> bool:
    return has(norm, "norm_layer", "chunk_size")


def refuse_frame_norms(*norms: Any) -> str | None:
    for norm in norms:
        why = unknown(norm, "norm_layer", "chunk_size") if is_frame_norm(norm) else "its norm is not one of frames"
        if why is not None:
            return why
    return refuse_group_norms(*(norm.norm_layer for norm in norms))


def refuse_border_convs(*convs: Any) -> str | None:
    for conv in convs:
        if not is_cached_conv(conv) or conv.pad_mode != "replicate":
            return f"its convolution is a {type(conv).__name__} that does not pad with the border"
    return refuse_plain_convs(*(conv.conv for conv in convs))


register(
    Kind(
        name="Mochi residual block (GroupNorm of frames, SiLU, conv, twice)",
        ops=("norm_silu", "causal_conv3d"),
        match=lambda m: has(m, "norm1", "conv1", "norm2", "conv2", "nonlinearity") and is_frame_norm(m.norm1),
        refuse=lambda m: (
            unknown(m, "norm1", "conv1", "norm2", "conv2", "nonlinearity")
            or refuse_border_convs(m.conv1, m.conv2)
            or refuse_frame_norms(m.norm1, m.norm2)
            or refuse_activation(m.nonlinearity)
        ),
        patches=lambda m: [(m, "forward", residual_block_forward), *cached_conv_patches(m.conv1, m.conv2)],
        absorbs=lambda m: [m.norm1, m.norm1.norm_layer, m.norm2, m.norm2.norm_layer, m.nonlinearity],
        # passes before each conv: frames to batch 2, norm 3, cat 2, silu 2, padding 2 against 3; residual 3 against 1
        saving=lambda m: (8 * (m.in_channels + m.out_channels) + 2 * m.out_channels) * itemsize(m),
        unit="pixel",
    )
)

register(
    Kind(
        name="Mochi strided convolution",
        ops=("causal_conv3d",),
        match=lambda m: is_cached_conv(m) and m.conv.stride == m.conv.kernel_size and m.conv.stride[1] > 1,
        refuse=refuse_border_convs,
        patches=cached_conv_patches,
        saving=lambda m: 2 * m.conv.in_channels * itemsize(m),  # padding
        unit="pixel",
    )
)


def refuse_attentions(block: Any) -> str | None:
    for norm, attn in zip(block.norms, block.attentions, strict=True):
        if attn is None:
            continue
        if reason := refuse_processor(attn.processor, "MochiVaeAttnProcessor2_0"):
            return reason
        if not attn.is_causal or attn.residual_connection or attn.rescale_output_factor != 1.0:
            return "its attention is not causal, or scales its output"
        why = refuse_frame_norms(norm)
        if why is not None:
            return why
    return None


def blocks_patches(block: Any) -> Iterator:
    yield block, "forward", blocks_forward
    for attn in block.attentions:
        if attn is not None:
            yield attn, "processor", shared(FastditMochiVaeProcessor)


register(
    Kind(
        name="Mochi attention over the frames of each pixel",
        ops=("attention",),
        match=lambda m: (
            has(m, "resnets", "norms", "attentions") and any(is_frame_norm(norm) for norm in m.norms)
        ),
        refuse=lambda m: (
            unknown(m, "conv_in", "resnets", "norms", "attentions", *SAMPLING)
            or refuse_attentions(m)
        ),
        patches=blocks_patches,
        absorbs=lambda m: [part for norm in m.norms if norm is not None for part in (norm, norm.norm_layer)],
        # passes: frames to the batch, cat of the chunks and pixels to the batch 6, and back with the residual 2
        saving=lambda m: sum(8 * attn.query_dim * itemsize(attn) for attn in m.attentions if attn is not None),
        unit="pixel",
    )
)  # fmt: skip


def refuse_decoder(decoder: Any) -> str | None:
    for block in decoder.up_blocks:
        why = unknown(block, "resnets", "proj", *SAMPLING) if hasattr(block, "proj") else "its up blocks are others"
        if why is not None:
            return why
    return refuse_plain_convs(decoder.conv_in)


def decoder_patches(decoder: Any) -> Iterator:
    yield decoder, "forward", decoder_forward
    yield decoder.conv_in, "forward", conv_forward
    for block in decoder.up_blocks:
        yield block, "forward", up_block_forward


ENDS = ("block_in", "block_out", "proj_out", "nonlinearity")

register(
    Kind(
        name="Mochi encoder (first and last projection)",
        ops=("norm_silu",),
        match=lambda m: has(m, *ENDS, "fourier_features", "proj_in", "down_blocks", "norm_out"),
        refuse=lambda m: (
            unknown(m, *ENDS, "fourier_features", "proj_in", "down_blocks", "norm_out", "gradient_checkpointing")
            or refuse_activation(m.nonlinearity)
            or refuse_frame_norms(m.norm_out)
        ),
        patches=lambda m: [(m, "forward", encoder_forward)],
        absorbs=lambda m: [m.norm_out, m.norm_out.norm_layer, m.nonlinearity],
        # passes: frames to the batch 2, norm 3, cat 2, silu 2 against 3
        saving=lambda m: 6 * m.proj_out.in_features * itemsize(m),
        unit="pixel",
    )
)

register(
    Kind(
        name="Mochi decoder (first convolution, channels to pixels)",
        ops=("causal_conv3d", "activation"),
        match=lambda m: has(m, *ENDS, "conv_in", "up_blocks"),
        refuse=lambda m: (
            unknown(m, *ENDS, "conv_in", "up_blocks", "gradient_checkpointing")
            or refuse_activation(m.nonlinearity)
            or refuse_decoder(m)
        ),
        patches=decoder_patches,
        absorbs=lambda m: [m.nonlinearity],
        # the transposed copies for the projections
        saving=lambda m: 2 * sum(block.proj.in_features for block in m.up_blocks) * itemsize(m),
        unit="pixel",
    )
)
