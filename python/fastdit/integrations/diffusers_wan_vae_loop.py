"""diffusers' AutoencoderKLWan and its kin (Qwen-Image): encoder, decoder, and the loop over time that drives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.integrations.diffusers_wan_vae import cached, causal_conv_forward
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, is_causal_conv, itemsize, refuse_activation, refuse_convs, refuse_norms
from fastdit.integrations.vae_layers import channel_norm
from fastdit.models.vae import chunks, patchify, pieces, unpatchify
from fastdit.nn import channels_last


def encoder_forward(self, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
    x = cached(self.conv_in, channels_last(x), feat_cache, feat_idx)
    for layer in self.down_blocks:
        x = layer(x) if feat_cache is None else layer(x, feat_cache=feat_cache, feat_idx=feat_idx)
    x = self.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    x = cached(self.conv_out, x, feat_cache, feat_idx, **channel_norm(self.norm_out), act="silu")
    return x.contiguous()


def decoder_forward(self, x: Tensor, feat_cache=None, feat_idx=None, first_chunk: bool = False) -> Tensor:
    def last(x: Tensor) -> Tensor:
        return cached(self.conv_out, x, feat_cache, feat_idx, **channel_norm(self.norm_out), act="silu")

    x = cached(self.conv_in, channels_last(x), feat_cache, feat_idx)
    x = self.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    return upwards(list(self.up_blocks), last, x, feat_cache, feat_idx, first_chunk).contiguous()


def upwards(
    blocks: list[Any], last: Callable[[Tensor], Tensor], x: Tensor, feat_cache, feat_idx, first_chunk: bool
) -> Tensor:
    """The blocks, then the `last` layer; large pictures a few frames at a time to the end (`models.vae.pieces`)."""
    for i, block in enumerate(blocks):
        frames = 2 if any(getattr(m, "mode", None) == "upsample3d" for m in block.modules()) else 1
        if feat_cache is not None and (parts := pieces(x, frames)) is not None:
            slot, made = feat_idx[0], []
            for part in parts:
                feat_idx[0] = slot
                made.append(upwards(blocks[i:], last, part, feat_cache, feat_idx, first_chunk))
            return torch.cat(made, dim=2)
        x = block(x, feat_cache=feat_cache, feat_idx=feat_idx, **marked(block, first_chunk))
    return last(x)


def marked(module: nn.Module, first_chunk: bool) -> dict[str, bool]:
    """`first_chunk`, for the modules that ask for it: Wan's, not Qwen-Image's."""
    takes = "first_chunk" in inspect.unwrap(type(module).forward).__code__.co_varnames
    return {"first_chunk": first_chunk} if takes else {}


# The loop over time, without the concatenation in every step ------------------------------------------------------


def patch_size(vae: Any) -> int:
    return getattr(vae.config, "patch_size", None) or 1


def _encode(self, x: Tensor) -> Tensor:
    if self.use_tiling and (x.shape[-1] > self.tile_sample_min_width or x.shape[-2] > self.tile_sample_min_height):
        return type(self)._encode(self, x)
    self.clear_cache()
    x = patchify(x, patch_size(self))
    whole = 1 + (x.shape[2] - 1) // 4 * 4  # as the original: frames that fill no latent frame are dropped
    latents = []
    for start, stop in chunks(whole, 4):
        self._enc_conv_idx = [0]
        latents.append(self.encoder(x[:, :, start:stop], feat_cache=self._enc_feat_map, feat_idx=self._enc_conv_idx))
    encoded = self.quant_conv(torch.cat(latents, dim=2))
    self.clear_cache()
    return encoded


def _decode(self, z: Tensor, return_dict: bool = True):
    ratio = self.spatial_compression_ratio
    tile_height, tile_width = self.tile_sample_min_height // ratio, self.tile_sample_min_width // ratio
    if self.use_tiling and (z.shape[-1] > tile_width or z.shape[-2] > tile_height):
        return type(self)._decode(self, z, return_dict=return_dict)
    from diffusers.models.autoencoders.vae import DecoderOutput

    self.clear_cache()
    x = self.post_quant_conv(z)
    frames = []
    for start, stop in chunks(x.shape[2], 1):
        self._conv_idx = [0]
        first = marked(self.decoder, start == 0)
        y = self.decoder(x[:, :, start:stop], feat_cache=self._feat_map, feat_idx=self._conv_idx, **first)
        frames.append(unpatchify(y, patch_size(self)).clamp(min=-1.0, max=1.0))
    out = torch.cat(frames, dim=2)
    self.clear_cache()
    return DecoderOutput(sample=out) if return_dict else (out,)


encoder_forward.__name__ = decoder_forward.__name__ = "forward"


def register_side(side: str, blocks: str, forward: Callable) -> None:
    register(
        Kind(
            name=f"causal {side} (first and last convolution)",
            ops=("causal_conv3d", "next_cache"),
            match=lambda m: (
                has(m, "conv_in", "mid_block", blocks, "norm_out", "conv_out", "nonlinearity")
                and is_causal_conv(m.conv_in)
            ),
            refuse=lambda m: (
                refuse_convs(m.conv_in, m.conv_out) or refuse_norms(m.norm_out) or refuse_activation(m.nonlinearity)
            ),
            patches=lambda m: [
                (m, "forward", forward),
                (m.conv_in, "forward", causal_conv_forward),
                (m.conv_out, "forward", causal_conv_forward),
            ],
            absorbs=lambda m: [m.norm_out, m.nonlinearity],
            # passes: cat 2, pad 2 before the first convolution; as in a residual block before the last
            saving=lambda m: (4 * m.conv_in.in_channels + 15 * m.conv_out.in_channels) * itemsize(m),
            unit="pixel",
        )
    )


register_side("encoder", "down_blocks", encoder_forward)
register_side("decoder", "up_blocks", decoder_forward)

register(
    Kind(
        name="loop over time (encode, decode)",
        ops=("causal_conv3d",),
        match=lambda m: (
            has(m, "encoder", "decoder", "quant_conv", "post_quant_conv", "clear_cache", "_encode", "_decode")
            and is_causal_conv(m.post_quant_conv)
        ),
        refuse=lambda m: refuse_convs(m.quant_conv, m.post_quant_conv),
        patches=lambda m: [
            (m, "_encode", _encode),
            (m, "_decode", _decode),
            (m.quant_conv, "forward", causal_conv_forward),
            (m.post_quant_conv, "forward", causal_conv_forward),
        ],
        unit="pixel",
    )
)
