"""diffusers' AutoencoderKLTemporalDecoder (Stable Video Diffusion): the decoder, whole.

Frames are images of a batch in the original, and are cut into videos and joined again for every temporal layer. Here
the decoder makes one video of them, in channels_last_3d memory; its layers are called with that
(diffusers_allegro_vae.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.integrations.diffusers_allegro_vae import (
    FastditFrameAttnProcessor,
    convs_of,
    refuse_attention,
    refuse_residual_block,
    refuse_sampler,
    residual_block_forward,
    upsample_forward,
)
from fastdit.integrations.diffusers_processor import shared
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, refuse_activation, unknown
from fastdit.integrations.vae_layers import (
    checkpointed,
    conv_forward,
    group_norm_silu,
    refuse_group_norms,
    refuse_plain_convs,
)
from fastdit.integrations.vae_moves import of_frames, video


def decoder_forward(self, sample: Tensor, image_only_indicator: Tensor, num_frames: int = 1) -> Tensor:
    if not all(isinstance(attn.processor, FastditFrameAttnProcessor) for attn in self.mid_block.attentions):
        return original(self, sample, image_only_indicator, num_frames)
    frames = sample.unflatten(0, (-1, num_frames))
    x = self.conv_in(video(frames.permute(0, 1, 3, 4, 2).contiguous()))
    x = checkpointed(self, self.mid_block, x, image_only_indicator)
    x = x.to(next(iter(self.up_blocks.parameters())).dtype)
    for block in self.up_blocks:
        x = checkpointed(self, block, x, image_only_indicator)
    x = self.time_conv_out(self.conv_out(of_frames(group_norm_silu, self.conv_norm_out, x)))
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def mixed_block_forward(
    self, hidden_states: Tensor, temb: Tensor | None = None, image_only_indicator: Tensor | None = None
) -> Tensor:
    """x + (1 - alpha) * t(x), where x comes from the frames and x + t(x) from the video."""
    if hidden_states.ndim != 5:
        return original(self, hidden_states, temb, image_only_indicator)
    layers, mixer = self.temporal_res_block, self.time_mixer
    x = self.spatial_res_block(hidden_states, temb)
    y = layers.conv2(group_norm_silu(layers.norm2, layers.conv1(group_norm_silu(layers.norm1, x))))
    alpha = torch.sigmoid(mixer.mix_factor).to(x.dtype)
    return torch.addcmul(x, y, alpha if mixer.switch_spatial_to_temporal_mix else 1.0 - alpha)


decoder_forward.__name__ = mixed_block_forward.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------

DECODER = ("conv_in", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out", "time_conv_out")
MIXED = ("spatial_res_block", "temporal_res_block", "time_mixer")


def blocks_of(decoder: Any) -> list[Any]:
    return [decoder.mid_block, *decoder.up_blocks]


def samplers_of(decoder: Any) -> list[Any]:
    return [sampler for block in decoder.up_blocks for sampler in block.upsamplers or ()]


def refuse_mixed(block: Any) -> str | None:
    if not has(block, *MIXED):
        return f"its residual block is a {type(block).__name__}"
    layers, mixer = block.temporal_res_block, block.time_mixer
    if layers.time_emb_proj is not None or layers.conv_shortcut is not None:
        return "its temporal layers take a timestep or change the width"
    if mixer.merge_strategy != "learned":
        return f"its merge is {mixer.merge_strategy}, not learned"
    known = ("norm1", "conv1", "norm2", "dropout", "conv2", "nonlinearity", "time_emb_proj", "conv_shortcut")
    return (
        refuse_residual_block(block.spatial_res_block)
        or unknown(layers, *known)
        or refuse_group_norms(layers.norm1, layers.norm2)
        or refuse_plain_convs(layers.conv1, layers.conv2)
        or refuse_activation(layers.nonlinearity)
        or unknown(mixer, "mix_factor", "merge_strategy", "switch_spatial_to_temporal_mix")
        or unknown(block, *MIXED)
    )


def refuse(decoder: Any) -> str | None:
    reasons = [
        unknown(decoder, *DECODER, "gradient_checkpointing"),
        refuse_group_norms(decoder.conv_norm_out),
        refuse_plain_convs(decoder.conv_in, decoder.conv_out, decoder.time_conv_out),
        refuse_activation(decoder.conv_act),
        *(unknown(block, "resnets", "attentions", "upsamplers") for block in blocks_of(decoder)),
        *(refuse_mixed(resnet) for block in blocks_of(decoder) for resnet in block.resnets),
        *(refuse_sampler(sampler) for sampler in samplers_of(decoder)),
        *(refuse_attention(attn) for attn in decoder.mid_block.attentions),
    ]
    return next((why for why in reasons if why is not None), None)


def patches(decoder: Any) -> Iterator:
    yield decoder, "forward", decoder_forward
    for resnet in (resnet for block in blocks_of(decoder) for resnet in block.resnets):
        yield resnet, "forward", mixed_block_forward
        yield resnet.spatial_res_block, "forward", residual_block_forward
    for sampler in samplers_of(decoder):
        yield sampler, "forward", upsample_forward
    for attn in decoder.mid_block.attentions:
        yield attn, "processor", shared(FastditFrameAttnProcessor)
    for conv in convs_of(decoder):
        yield conv, "forward", conv_forward


def absorbed(decoder: Any) -> list[nn.Module]:
    mixed = [resnet for block in blocks_of(decoder) for resnet in block.resnets]
    norms = [m for m in decoder.modules() if isinstance(m, (nn.GroupNorm, nn.SiLU))]
    return [*norms, *(part for block in mixed for part in (block.temporal_res_block, block.time_mixer))]


register(
    Kind(
        name="SVD decoder (2-D residual blocks, temporal layers, upsampling)",
        ops=("norm_silu", "causal_conv3d", "attention"),
        match=lambda m: has(m, *DECODER) and all(has(block, "resnets") for block in blocks_of(m)),
        refuse=refuse,
        patches=patches,
        absorbs=absorbed,
        # passes before a convolution: norm 3, silu 2 against 3; and the video cut and joined, 4 for each temporal pair
        saving=lambda m: 4 * sum(conv.in_channels for conv in convs_of(m)) * itemsize(m),
        unit="pixel",
    )
)
