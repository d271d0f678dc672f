"""diffusers' AutoencoderKLLTXVideo (0.9 to 0.9.7) and AutoencoderKLLTX2Video: residual blocks, resampling, both ends.

Time is padded with the first frame (causal), or with the first and the last (symmetric). LTX fixes which per module,
LTX-2 per call. Everything between the first and the last convolution is in channels_last_3d memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, refuse_activation, unknown
from fastdit.integrations.vae_layers import checkpointed, conv_forward, layer_norm, refuse_plain_convs
from fastdit.integrations.vae_moves import depth_to_space, from_tokens, grid_of, pixels, space_to_depth, tokens, video
from fastdit.nn import channels_last

SPACE_PADS = ("zeros", "reflect", "replicate")  # named alike by nn.Conv3d and by the op


def causal_conv_forward(self, hidden_states: Tensor, causal: bool | None = None, **fused) -> Tensor:
    """LTXVideoCausalConv3d, LTX2VideoCausalConv3d; `fused` goes to the convolution inside."""
    if causal is None:
        causal = getattr(self, "is_causal", True)
    missing = self.kernel_size[0] - 1
    before, after = (missing, 0) if causal else (missing // 2, missing // 2)
    _, p_h, p_w = self.conv.padding
    return self.conv(
        hidden_states,
        padding=(before, after, p_h, p_h, p_w, p_w),
        time_pad="first",
        space_pad=self.conv.padding_mode,
        **fused,
    )


# The residual block -----------------------------------------------------------------------------------------------


def residual_block_forward(
    self,
    inputs: Tensor,
    temb: Any = None,
    generator: torch.Generator | None = None,
    causal: bool | None = None,
) -> Tensor:
    modulation: list = [(), ()]
    if self.scale_shift_table is not None:
        shift_1, scale_1, shift_2, scale_2 = (temb.flatten(1).unflatten(1, (4, -1)) + self.scale_shift_table).unbind(1)
        modulation = [(shift_1, scale_1), (shift_2, scale_2)]

    noise = None if self.per_channel_scale1 is None else noise_like(inputs, self.per_channel_scale1, generator)
    y = norm_act_conv(self, inputs, self.norm1, modulation[0], self.conv1, causal, noise)

    shortcut = inputs if self.norm3 is None else layer_norm(self.norm3, inputs)
    if self.conv_shortcut is not None:
        shortcut = self.conv_shortcut(shortcut, **({"causal": causal} if hasattr(self.conv_shortcut, "conv") else {}))
    if self.per_channel_scale2 is not None:
        shortcut = shortcut + noise_like(inputs, self.per_channel_scale2, generator)
    return norm_act_conv(self, y, self.norm2, modulation[1], self.conv2, causal, shortcut)


def norm_act_conv(block, x: Tensor, norm, modulation, conv, causal: bool | None, residual: Tensor | None) -> Tensor:
    """conv(silu(norm(x) * (1 + scale) + shift)) + residual: one op, two where there is a modulation (shift, scale)."""
    if not modulation:
        return conv(x, causal, norm="channel_rms", norm_eps=norm.eps, act="silu", residual=residual)
    return conv(modulated(block, x, norm, *modulation), causal, act="silu", residual=residual)


def modulated(block, x: Tensor, norm, shift: Tensor, scale: Tensor) -> Tensor:
    precision = law(block, x, scale)
    y = ops.norm_modulate(tokens(x), shift=shift, scale=scale, norm="rms", eps=norm.eps, precision=precision)
    return from_tokens(y, x)


def noise_like(x: Tensor, scale: Tensor, generator: torch.Generator | None) -> Tensor:
    """One picture of noise for all samples and frames, times `scale` (C, 1, 1) per channel."""
    picture = torch.randn(x.shape[-2:], generator=generator, device=x.device, dtype=x.dtype)
    noise = (picture[..., None] * scale.flatten()).permute(2, 0, 1)
    return noise[None, :, None].expand(x.shape[0], -1, x.shape[2], -1, -1)


# Resampling -------------------------------------------------------------------------------------------------------


def downsampler_forward(self, hidden_states: Tensor, causal: bool | None = None) -> Tensor:
    """space_to_depth(conv(x)) + the means of runs of `group_size` channels of space_to_depth(x)."""
    if self.stride[0] > 1:
        hidden_states = torch.cat([hidden_states[:, :, : self.stride[0] - 1], hidden_states], dim=2)
    means = space_to_depth(hidden_states, self.stride).unflatten(-1, (-1, self.group_size)).mean(-1)
    return video(space_to_depth(self.conv(hidden_states, causal), self.stride) + means)


def upsampler_forward(self, hidden_states: Tensor, causal: bool | None = None) -> Tensor:
    """depth_to_space(conv(x) + repeats of x), without the frames before the first."""
    residual = None
    if self.residual:
        repeats = self.conv.conv.out_channels // hidden_states.shape[1]
        residual = video(pixels(hidden_states).repeat(1, 1, 1, 1, repeats))
    y = self.conv(hidden_states, causal, residual=residual)
    return depth_to_space(y, self.stride)[:, :, self.stride[0] - 1 :]


# Both ends --------------------------------------------------------------------------------------------------------


def run(side, block: nn.Module, x: Tensor, temb: Tensor | None, causal: bool | None) -> Tensor:
    """A block of the encoder or the decoder; LTX-2's also take the flag."""
    return checkpointed(side, block, x, temb, *([] if causal is None else [None, causal]))


def flag(side, causal: bool | None) -> bool | None:
    """LTX-2 decides per call; LTX's modules know."""
    return (causal or side.is_causal) if hasattr(side, "is_causal") else None


def encoder_forward(self, hidden_states: Tensor, causal: bool | None = None) -> Tensor:
    causal, p, p_t = flag(self, causal), self.patch_size, self.patch_size_t
    x = hidden_states.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, p_t))
    x = video(x.permute(0, 2, 4, 6, 1, 3, 7, 5).flatten(4))  # channels in the order (c, t, w, h)
    x = self.conv_in(channels_last(x), causal)
    for block in (*self.down_blocks, self.mid_block):
        x = run(self, block, x, None, causal)
    x = norm_act_conv(self, x, self.norm_out, (), self.conv_out, causal, None).contiguous()
    return torch.cat([x, x[:, -1:].expand(-1, x.shape[1] - 2, -1, -1, -1)], dim=1)


def decoder_forward(self, hidden_states: Tensor, temb: Any = None, causal: bool | None = None) -> Tensor:
    causal = flag(self, causal)
    x = self.conv_in(channels_last(hidden_states), causal)
    if self.timestep_scale_multiplier is not None:
        temb = temb * self.timestep_scale_multiplier
    for block in (self.mid_block, *self.up_blocks):
        x = run(self, block, x, temb, causal)
    modulation: tuple = ()
    if self.time_embedder is not None:
        temb = self.time_embedder(
            timestep=temb.flatten(), resolution=None, aspect_ratio=None, batch_size=x.shape[0], hidden_dtype=x.dtype
        )
        modulation = (temb.view(x.shape[0], 2, -1) + self.scale_shift_table).unbind(1)
    x = norm_act_conv(self, x, self.norm_out, modulation, self.conv_out, causal, None)
    p, p_t = self.patch_size, self.patch_size_t
    return ops.unpatchify3d(
        tokens(x),
        grid=grid_of(x),
        patch=(p_t, p, p),
        channels=x.shape[1] // (p_t * p * p),
        order="ctwh",
    )


for function in (
    causal_conv_forward,
    residual_block_forward,
    downsampler_forward,
    upsampler_forward,
    encoder_forward,
    decoder_forward,
):
    function.__name__ = "forward"


# Recognition ------------------------------------------------------------------------------------------------------


def is_causal_conv(module: Any) -> bool:
    return (
        has(module, "conv", "kernel_size", "in_channels", "out_channels")
        and isinstance(module.conv, nn.Conv3d)
        and not hasattr(module, "pad_mode")
    )


def refuse_causal_convs(*convs: Any) -> str | None:
    for conv in convs:
        if not is_causal_conv(conv):
            return f"its convolution is a {type(conv).__name__}"
        why = unknown(conv, "conv", "kernel_size", "is_causal") or refuse_inner_conv(conv.conv)
        if why is not None:
            return why
    return None


def refuse_inner_conv(conv: nn.Conv3d) -> str | None:
    if type(conv) is not nn.Conv3d or conv.groups != 1 or conv.padding[0] or conv.padding_mode not in SPACE_PADS:
        return f"its convolution is a {type(conv).__name__} with groups, padding in time, another border or a wrapper"
    return None


def refuse_norms(*norms: Any) -> str | None:
    for norm in norms:
        if type(norm).__name__ not in ("RMSNorm", "PerChannelRMSNorm") or getattr(norm, "channel_dim", 1) != 1:
            return f"its norm is a {type(norm).__name__}, not one over the channels"
        why = unknown(norm, "eps", "channel_dim", "weight", "bias")
        if why is not None or getattr(norm, "weight", None) is not None:
            return why or "its norm has a weight"
    return None


def conv_patches(*convs: Any) -> Iterator:
    """Both forwards of a causal convolution; a shortcut may be a plain one, or None."""
    for conv in convs:
        if is_causal_conv(conv):
            yield conv, "forward", causal_conv_forward
            conv = conv.conv
        if conv is not None:
            yield conv, "forward", conv_forward


BLOCK = (
    "nonlinearity", "norm1", "conv1", "norm2", "dropout", "conv2", "norm3", "conv_shortcut",
    "per_channel_scale1", "per_channel_scale2", "scale_shift_table",
)  # fmt: skip


def refuse_residual_block(block: Any) -> str | None:
    if block.dropout.p > 0:
        return f"dropout p={block.dropout.p} between its norm and its convolution"
    shortcut = block.conv_shortcut
    return (
        unknown(block, *BLOCK)
        or refuse_causal_convs(block.conv1, block.conv2, *([shortcut] if is_causal_conv(shortcut) else []))
        or (None if shortcut is None or is_causal_conv(shortcut) else refuse_plain_convs(shortcut))
        or refuse_norms(block.norm1, block.norm2)
        or (None if block.norm3 is None or type(block.norm3) is nn.LayerNorm else "its norm3 is not nn.LayerNorm")
        or refuse_activation(block.nonlinearity)
    )


register(
    Kind(
        name="LTX residual block (RMS norm, SiLU, conv, twice)",
        ops=("causal_conv3d", "norm_modulate"),
        match=lambda m: has(m, *BLOCK) and is_causal_conv(m.conv1),
        refuse=refuse_residual_block,
        patches=lambda m: [
            (m, "forward", residual_block_forward),
            *conv_patches(m.conv1, m.conv2, m.conv_shortcut),
        ],
        absorbs=lambda m: [m.norm1, m.norm2, *([] if m.norm3 is None else [m.norm3]), m.nonlinearity],
        # passes before each conv: square 2, mean 1, product 2, silu 2, cat 2; residual 3 against 1
        saving=lambda m: (9 * (m.conv1.in_channels + m.conv2.in_channels) + 2 * m.conv2.out_channels) * itemsize(m),
        unit="pixel",
    )
)


def register_resampling(name: str, attribute: str, forward: Any, reads: tuple[str, ...]) -> None:
    register(
        Kind(
            name=name,
            ops=("causal_conv3d",),
            match=lambda m: has(m, "conv", "stride", attribute) and is_causal_conv(m.conv),
            refuse=lambda m: unknown(m, "conv", "stride", *reads) or refuse_causal_convs(m.conv),
            patches=lambda m: [(m, "forward", forward), *conv_patches(m.conv)],
            # passes: cat of the missing frames 2
            saving=lambda m: 2 * m.conv.in_channels * itemsize(m),
            unit="pixel",
        )
    )


register_resampling("LTX downsampling (conv, space to depth)", "group_size", downsampler_forward, ("group_size",))
register_resampling(
    "LTX upsampling (conv, depth to space)", "upscale_factor", upsampler_forward, ("residual", "upscale_factor")
)

register(
    Kind(
        name="LTX strided convolution",
        ops=("causal_conv3d",),
        match=lambda m: is_causal_conv(m) and set(m.conv.stride) == {2},
        refuse=refuse_causal_convs,
        patches=conv_patches,
        saving=lambda m: 2 * m.in_channels * itemsize(m),  # cat of the missing frames
        unit="pixel",
    )
)

ENDS = ("conv_in", "mid_block", "norm_out", "conv_act", "conv_out", "patch_size", "patch_size_t",
        "gradient_checkpointing", "is_causal")  # fmt: skip


def register_side(side: str, forward: Any, *blocks: str) -> None:
    register(
        Kind(
            name=f"LTX {side} (first and last convolution, patches)",
            ops=("causal_conv3d", "norm_modulate") + (("unpatchify3d",) if side == "decoder" else ()),
            match=lambda m: has(m, "conv_in", "mid_block", blocks[0], "patch_size_t") and is_causal_conv(m.conv_in),
            refuse=lambda m: (
                unknown(m, *ENDS, *blocks)
                or refuse_causal_convs(m.conv_in, m.conv_out)
                or refuse_norms(m.norm_out)
                or refuse_activation(m.conv_act)
            ),
            patches=lambda m: [(m, "forward", forward), *conv_patches(m.conv_in, m.conv_out)],
            absorbs=lambda m: [m.norm_out, m.conv_act],
            # passes: cat 2 before the first convolution, as in a residual block before the last
            saving=lambda m: (2 * m.conv_in.in_channels + 9 * m.conv_out.in_channels) * itemsize(m),
            unit="pixel",
        )
    )


register_side("encoder", encoder_forward, "down_blocks")
register_side(
    "decoder", decoder_forward, "up_blocks", "time_embedder", "scale_shift_table", "timestep_scale_multiplier"
)
