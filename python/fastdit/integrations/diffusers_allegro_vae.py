"""diffusers' AutoencoderKLAllegro: blocks of 2-D residual blocks and temporal layers, and both ends.

Not causal: temporal layers repeat the first and the last frame, and their GroupNorm counts the repeats. Frames stay
where they are: videos are in channels_last_3d memory throughout, and the layers inside a block are called with videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_processor import Processor, queries_keys_values, refuse_processor, shared
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, refuse_activation, unknown
from fastdit.integrations.vae_layers import (
    checkpointed,
    conv_forward,
    group_norm,
    group_norm_silu,
    nearest,
    refuse_group_norms,
    refuse_plain_convs,
)
from fastdit.integrations.vae_moves import of_frames, pixels, video
from fastdit.models.vae import AFTER
from fastdit.nn import channels_last, upsampled

# Layers of a block: called with videos; images go to the layer as it was ------------------------------------------


def residual_block_forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args, **kwargs) -> Tensor:
    if input_tensor.ndim != 5:
        return original(self, input_tensor, temb, *args, **kwargs)
    shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
    y = self.conv1(of_frames(group_norm_silu, self.norm1, input_tensor))
    return self.conv2(of_frames(group_norm_silu, self.norm2, y), residual=shortcut)


def temporal_layer_forward(self, hidden_states: Tensor, batch_size: int) -> Tensor:
    """x + four times conv(silu(GroupNorm(x and its first and last frame again))); may halve or double the frames."""
    x = hidden_states
    if x.ndim != 5:
        return original(self, x, batch_size)
    if self.down_sample:
        identity, y = x[:, :, ::2], step(self.conv1, x)
    elif self.up_sample:
        identity, y = nearest(x, (2, 1, 1), first_apart=False), step(self.conv1, x)
        y = video(pixels(y).unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2))
    else:
        identity, y = x, step(self.conv1, with_ends(x))
    y = step(self.conv3, with_ends(step(self.conv2, with_ends(y))))
    return step(self.conv4, with_ends(y), residual=identity)


def step(layers: nn.Sequential, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """GroupNorm, SiLU, dropout (at rest), convolution."""
    return layers[-1](group_norm_silu(layers[0], x), residual=residual)  # type: ignore[arg-type]


def with_ends(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)


def downsample_forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    if hidden_states.ndim != 5:
        return original(self, hidden_states, *args, **kwargs)
    return self.conv(hidden_states, padding=AFTER)


def upsample_forward(self, hidden_states: Tensor, output_size: int | None = None, *args, **kwargs) -> Tensor:
    if hidden_states.ndim != 5:
        return original(self, hidden_states, output_size, *args, **kwargs)
    return upsampled(self.conv, hidden_states)


class FastditFrameAttnProcessor(Processor):
    """AttnProcessor2_0 with its GroupNorm and residual, over the pixels of each frame of a video."""

    def __init__(self):
        from diffusers.models.attention_processor import AttnProcessor2_0

        super().__init__(AttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args,
        **kwargs,
    ) -> Tensor:
        x = hidden_states
        if x.ndim != 5:
            return self.original(attn, x, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        h = pixels(of_frames(group_norm, attn.group_norm, x)).flatten(2, 3).flatten(0, 1)  # (B*T, H*W, C)
        y = attn.to_out[1](attn.to_out[0](ops.attention(*queries_keys_values(attn, h)).flatten(2)))
        return x + video(y.unflatten(1, x.shape[3:]).unflatten(0, (x.shape[0], -1)))


# Blocks and both ends ---------------------------------------------------------------------------------------------


def block_forward(self, hidden_states: Tensor) -> Tensor:
    attentions = getattr(self, "attentions", ())
    ours = all(isinstance(attn.processor, FastditFrameAttnProcessor) for attn in attentions)
    if not ours or (self.training and drops(self)):
        return original(self, hidden_states)
    x, batch = hidden_states, hidden_states.shape[0]
    for i, (resnet, temp_conv) in enumerate(zip(self.resnets, self.temp_convs, strict=True)):
        if i > 0 and attentions:
            x = attentions[i - 1](x)
        x = temp_conv(resnet(x, temb=None), batch_size=batch)
    for layer in temporal_resampling(self):
        x = layer(x, batch_size=batch)
    for sampler in samplers_of(self):
        x = sampler(x)
    return x


def drops(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in block.modules())


def temporal_resampling(block: Any) -> list[Any]:
    return [getattr(block, name) for name in ("temp_convs_down", "temp_conv_up") if hasattr(block, name)]


def samplers_of(block: Any) -> Any:
    return getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or ()


def first_convs(side: Any, sample: Tensor) -> Tensor:
    x = side.conv_in(channels_last(sample))
    return side.temp_conv_in(x, residual=x)


def last_convs(side: Any, x: Tensor) -> Tensor:
    """Each frame contiguous by itself, as the original leaves them."""
    x = of_frames(group_norm_silu, side.conv_norm_out, x)
    return side.conv_out(side.temp_conv_out(x, residual=x)).transpose(1, 2).contiguous().transpose(1, 2)


def encoder_forward(self, sample: Tensor) -> Tensor:
    x = first_convs(self, sample)
    for block in (*self.down_blocks, self.mid_block):
        x = checkpointed(self, block, x)
    return last_convs(self, x)


def decoder_forward(self, sample: Tensor) -> Tensor:
    x = checkpointed(self, self.mid_block, first_convs(self, sample))
    x = x.to(next(iter(self.up_blocks.parameters())).dtype)
    for block in self.up_blocks:
        x = checkpointed(self, block, x)
    return last_convs(self, x)


for function in (
    residual_block_forward,
    temporal_layer_forward,
    downsample_forward,
    upsample_forward,
    block_forward,
    encoder_forward,
    decoder_forward,
):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------

STEPS = ("conv1", "conv2", "conv3", "conv4")


def is_temporal_layer(module: Any) -> bool:
    return has(module, *STEPS, "up_sample", "down_sample") and isinstance(module.conv1, nn.Sequential)


def refuse_residual_block(block: Any) -> str | None:
    if block.time_emb_proj is not None or block.upsample is not None or block.downsample is not None:
        return "its residual block takes a timestep or resamples"
    if block.time_embedding_norm == "scale_shift" or block.output_scale_factor != 1.0:
        return "its residual block scales its norm or its output"
    return (
        unknown(
            block, "norm1", "conv1", "norm2", "dropout", "conv2", "nonlinearity", "conv_shortcut", "time_emb_proj",
            "upsample", "downsample", "time_embedding_norm", "skip_time_act", "output_scale_factor",
        )
        or refuse_group_norms(block.norm1, block.norm2)
        or refuse_plain_convs(*convs_of(block))
        or refuse_activation(block.nonlinearity)
    )  # fmt: skip


def refuse_temporal_layer(layer: Any) -> str | None:
    if not is_temporal_layer(layer):
        return f"its temporal layer is a {type(layer).__name__}"
    steps = [[m for m in getattr(layer, name) if not isinstance(m, nn.Dropout)] for name in STEPS]
    if any(len(modules) != 3 for modules in steps):
        return "its temporal layer has more than norm, SiLU and convolution"
    why = unknown(layer, *STEPS, "up_sample", "down_sample")
    for norm, act, conv in steps:
        why = why or refuse_group_norms(norm) or refuse_activation(act) or refuse_plain_convs(conv)
    return why


def refuse_sampler(sampler: Any) -> str | None:
    if sampler.norm is not None or not sampler.use_conv or not hasattr(sampler, "conv"):
        return "its resampling has a norm or no convolution"
    if sampler.conv.stride == (1, 1) and (not sampler.interpolate or sampler.name != "conv"):
        return "its upsampling does not interpolate"
    if sampler.conv.stride != (1, 1) and sampler.padding != 0:
        return "its downsampling pads both sides"
    return refuse_plain_convs(sampler.conv)


def refuse_attention(attn: Any) -> str | None:
    if reason := refuse_processor(attn.processor, "AttnProcessor2_0"):
        return reason
    if attn.spatial_norm is not None or attn.norm_q is not None or not attn.residual_connection:
        return "norms inside its attention, or no residual"
    if attn.rescale_output_factor != 1.0:
        return "its attention scales its output"
    return refuse_group_norms(attn.group_norm)


def refuse_block(block: Any) -> str | None:
    """Every layer of the block is known, or it stays whole."""
    reasons = [
        unknown(
            block, "resnets", "temp_convs", "attentions", "temp_convs_down", "temp_conv_up", "add_temp_downsample",
            "add_temp_upsample", "downsamplers", "upsamplers",
        ),
        *(refuse_residual_block(resnet) for resnet in block.resnets),
        *(refuse_temporal_layer(layer) for layer in (*block.temp_convs, *temporal_resampling(block))),
        *(refuse_sampler(sampler) for sampler in samplers_of(block)),
        *(refuse_attention(attn) for attn in getattr(block, "attentions", ())),
    ]  # fmt: skip
    return next((why for why in reasons if why is not None), None)


def convs_of(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]


def block_patches(block: Any) -> Iterator:
    yield block, "forward", block_forward
    for resnet in block.resnets:
        yield resnet, "forward", residual_block_forward
    for layer in (*block.temp_convs, *temporal_resampling(block)):
        yield layer, "forward", temporal_layer_forward
    for sampler in samplers_of(block):
        yield sampler, "forward", upsample_forward if sampler.conv.stride == (1, 1) else downsample_forward
    for attn in getattr(block, "attentions", ()):
        yield attn, "processor", shared(FastditFrameAttnProcessor)
    for conv in convs_of(block):
        yield conv, "forward", conv_forward


register(
    Kind(
        name="Allegro block (2-D residual blocks, temporal layers, resampling)",
        ops=("norm_silu", "causal_conv3d", "attention"),
        match=lambda m: has(m, "resnets", "temp_convs") and any(is_temporal_layer(t) for t in m.temp_convs),
        refuse=refuse_block,
        patches=block_patches,
        absorbs=lambda block: [m for m in block.modules() if isinstance(m, (nn.GroupNorm, nn.SiLU))],
        # passes before a convolution: norm 3, silu 2 against 3; and cat twice 4 against once 2, frames to the batch 2
        saving=lambda block: 4 * sum(conv.in_channels for conv in convs_of(block)) * itemsize(block),
        unit="pixel",
    )
)

ENDS = ("conv_in", "temp_conv_in", "mid_block", "conv_norm_out", "conv_act", "temp_conv_out", "conv_out")


def end_convs(side: Any) -> list[Any]:
    return [side.conv_in, side.temp_conv_in, side.temp_conv_out, side.conv_out]


def register_side(side: str, blocks: str, forward: Callable) -> None:
    register(
        Kind(
            name=f"Allegro {side} (first and last convolutions)",
            ops=("norm_silu", "causal_conv3d"),
            match=lambda m: has(m, *ENDS, blocks),
            refuse=lambda m: (
                unknown(m, *ENDS, blocks, "gradient_checkpointing")
                or refuse_group_norms(m.conv_norm_out)
                or refuse_plain_convs(*end_convs(m))
                or refuse_activation(m.conv_act)
            ),
            patches=lambda m: [
                (m, "forward", forward),
                *((conv, "forward", conv_forward) for conv in end_convs(m)),
            ],
            absorbs=lambda m: [m.conv_norm_out, m.conv_act],
            # passes: frames to the batch and back 4, the residuals 3 against 1 twice, norm 3, silu 2 against 3
            saving=lambda m: (6 * m.temp_conv_in.in_channels + 8 * m.temp_conv_out.in_channels) * itemsize(m),
            unit="pixel",
        )
    )


register_side("encoder", "down_blocks", encoder_forward)
register_side("decoder", "up_blocks", decoder_forward)
