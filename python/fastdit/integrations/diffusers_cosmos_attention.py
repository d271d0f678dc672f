"""diffusers' AutoencoderKLCosmos: attention in each frame, then over the frames of each pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_cosmos_vae import (
    conv_patches,
    is_causal_conv,
    normed,
    refuse_causal_convs,
    refuse_dropout,
    refuse_frame_norms,
)
from fastdit.integrations.diffusers_processor import Processor, shared
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, unknown
from fastdit.integrations.vae_layers import frame_causal_attention, group_norm
from fastdit.integrations.vae_moves import pixels, video
from fastdit.nn import channels_last

CAUSAL = "causal"  # what the blocks below pass in place of a triangular mask


class FastditCosmosProcessor(Processor):
    """Attention with a residual: each token of `groups` sees its group, in causal order where the block asks for it.

    A mask goes to the original.
    """

    original_name: str

    def __init__(self):
        from diffusers.models.autoencoders import autoencoder_kl_cosmos

        super().__init__(getattr(autoencoder_kl_cosmos, self.original_name)())

    def groups(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (groups, tokens, C), a view where nothing is batched twice."""
        raise NotImplementedError

    def ungrouped(self, y: Tensor, x: Tensor) -> Tensor:
        """(groups, tokens, C) -> (B, C, T, H, W) of x's size."""
        raise NotImplementedError

    def __call__(self, attn: Any, hidden_states: Tensor, attention_mask: Tensor | str | None = None) -> Tensor:
        if isinstance(attention_mask, Tensor):
            return self.original(attn, hidden_states=hidden_states, attention_mask=attention_mask)
        h = channels_last(normed(group_norm, attn.norm, hidden_states))
        query, key, value = (
            self.groups(project(h)).unflatten(2, (attn.num_attention_heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attention_mask == CAUSAL:
            y = frame_causal_attention(query, key, value, frame_tokens=1)
        else:
            y = ops.attention(query, key, value)
        return attn.to_out[0](self.ungrouped(y.flatten(2), hidden_states), residual=hidden_states)


class FastditCosmosSpatialProcessor(FastditCosmosProcessor):
    original_name = "CosmosSpatialAttentionProcessor2_0"

    def groups(self, x: Tensor) -> Tensor:
        return pixels(x).flatten(2, 3).flatten(0, 1)

    def ungrouped(self, y: Tensor, x: Tensor) -> Tensor:
        return video(y.unflatten(1, x.shape[3:]).unflatten(0, (x.shape[0], -1)))


class FastditCosmosTemporalProcessor(FastditCosmosProcessor):
    original_name = "CosmosTemporalAttentionProcessor2_0"

    def groups(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 4, 2, 1).flatten(0, 2)

    def ungrouped(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.unflatten(0, (x.shape[0], *x.shape[3:])).permute(0, 4, 3, 1, 2)
        return channels_last(y)


PROCESSORS = {kind.original_name: kind for kind in (FastditCosmosSpatialProcessor, FastditCosmosTemporalProcessor)}


def block_forward(self, hidden_states: Tensor) -> Tensor:
    """Residual blocks, each followed by attention in each frame and then over frames; resampling at the end."""
    if not all(isinstance(attn.processor, FastditCosmosProcessor) for attn in attentions_of(self)):
        return original(self, hidden_states)
    x, middle = hidden_states, len(self.resnets) > len(self.attentions)
    for i, resnet in enumerate(self.resnets):
        x = resnet(x)
        if i < len(self.attentions):
            x = self.attentions[i](x)
            x = self.temp_attentions[i](x, CAUSAL)
    for sampler in () if middle else samplers_of(self):
        x = sampler(x)
    return x


def attentions_of(block: Any) -> list[Any]:
    return [attn for attn in (*block.attentions, *block.temp_attentions) if attn is not None]


def samplers_of(block: Any) -> Any:
    return getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or ()


block_forward.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------


def refuse_blocks(block: Any) -> str | None:
    for attn in attentions_of(block):
        name = type(attn.processor).__name__
        if name not in PROCESSORS:
            return f"its processor is {name}, not one of Cosmos"
        why = (
            unknown(attn, "norm", "to_q", "to_k", "to_v", "to_out", "processor")
            or refuse_causal_convs(attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
            or refuse_frame_norms(attn.norm)
            or refuse_dropout(attn.to_out[1])
        )
        if why is not None:
            return why
    return unknown(block, "resnets", "attentions", "temp_attentions", "downsamplers", "upsamplers")


def block_patches(block: Any) -> Iterator:
    yield block, "forward", block_forward
    for attn in attentions_of(block):
        yield attn, "processor", shared(PROCESSORS[type(attn.processor).__name__])
        yield from conv_patches(attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])


register(
    Kind(
        name="Cosmos attention in each frame, then over frames",
        ops=("attention", "causal_conv3d"),
        match=lambda m: (
            has(m, "resnets", "attentions", "temp_attentions")
            and len(attentions_of(m)) == 2 * len(m.attentions)
            and has(m.attentions[0], "to_q", "norm", "num_attention_heads")
            and is_causal_conv(m.attentions[0].to_q)
        ),
        refuse=refuse_blocks,
        patches=block_patches,
        absorbs=lambda m: [part for attn in attentions_of(m) for part in (attn.norm, attn.norm.norm)],
        # passes: cat and padding before four convolutions 16, transposed copies 8, residual 2
        saving=lambda m: sum(26 * attn.to_q.in_channels * itemsize(attn) for attn in attentions_of(m)),
        unit="pixel",
    )
)
