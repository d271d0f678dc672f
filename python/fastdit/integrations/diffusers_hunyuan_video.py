"""diffusers' HunyuanVideo, its token-replace and Framepack variants, HunyuanVideo-1.5 and HunyuanImage: the blocks.

The first frame of a token-replaced video has modulation of its own: tables of two rows per sample and a row index,
where the original cuts the tokens in two and joins them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_processor import Processor
from fastdit.integrations.diffusers_wan import patch_conv_forward
from fastdit.integrations.joint import (
    Tables,
    adaln_zero,
    close_stream,
    open_stream,
    refuse_adaln,
    refuse_plain_norms,
)
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

Rotary = tuple[Tensor, Tensor] | None


def two_rows(temb: Tensor, first: Tensor) -> Tensor:
    """Conditioning (2B, C) of the rest of each video and of its first frame, in turns."""
    return torch.stack([temb, first], dim=1).flatten(0, 1)


def row_index(x: Tensor, num_tokens: int) -> Tensor:
    """The row (B, N) of such a table for each token of x (B, N, C), whose first num_tokens are the first frame's."""
    row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32) * 2
    return row[:, None] + (torch.arange(x.shape[1], device=x.device) < num_tokens)


# The dual block ----------------------------------------------------------------------------------------------------


def dual_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Rotary = None,
    *args,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    video = adaln_zero(self.norm1, temb)
    return dual(self, hidden_states, encoder_hidden_states, temb, video, None, attention_mask, freqs_cis)


def image_dual_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary = None,
    *args,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    return dual_forward(self, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb)


def token_replace_dual_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Rotary = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    assert token_replace_emb is not None and num_tokens is not None  # the original needs them too
    video, index = adaln_zero(self.norm1, two_rows(temb, token_replace_emb)), row_index(hidden_states, num_tokens)
    return dual(self, hidden_states, encoder_hidden_states, temb, video, index, attention_mask, freqs_cis)


def dual(
    block: Any,
    x: Tensor,
    context: Tensor,
    temb: Tensor,
    video: Tables,
    index: Tensor | None,
    mask: Tensor | None,
    rotary: Rotary,
    close: Callable[[Tensor, Tensor, Tensor, str], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Both streams; close: (x, attention's output, the text as it entered, law) -> the video, where another end is."""
    x = x.contiguous()  # the first block's come transposed from an eager patch embedding
    text = adaln_zero(block.norm1_context, temb)
    precision, text_precision = law(block, x, video.gate1), law(block, context, text.gate1)  # autocast widens one
    c = open_stream(context, text, block.norm1_context.norm, text_precision)
    y, context_output = block.attn(
        hidden_states=open_stream(x, video, block.norm1.norm, precision, index),
        encoder_hidden_states=c,
        attention_mask=mask,
        image_rotary_emb=rotary,
    )
    context = close_stream(context, context_output, text, block.norm2_context, block.ff_context, text_precision)
    if close is not None:
        return close(x, y, c, precision), context
    return close_stream(x, y, video, block.norm2, block.ff, precision, index), context


DUAL = ("norm1", "norm1_context", "attn", "norm2", "ff", "norm2_context", "ff_context")
START = ("hidden_states", "encoder_hidden_states", "temb", "attention_mask")
ANY = ("args", "kwargs")
FIRST_FRAME = ("token_replace_emb", "num_tokens")
DUALS: dict[tuple[str, ...], Callable] = {
    (*START, "freqs_cis", *ANY): dual_forward,
    (*START, "image_rotary_emb", *ANY): image_dual_forward,
    (*START, "freqs_cis", *FIRST_FRAME): token_replace_dual_forward,
}


def refuse_dual(block: Any, *more: str) -> str | None:
    """`more` are the children and settings that this kind of block has besides HunyuanVideo's."""
    return (
        refuse_adaln(block.norm1)
        or refuse_adaln(block.norm1_context)
        or refuse_plain_norms(block.norm2, block.norm2_context)
        or unknown(block, *DUAL, *more)
    )


def absorbed_by_dual(block: Any) -> list[Any]:
    norms = (block.norm1, block.norm1_context)
    return [*norms, *(norm.norm for norm in norms), block.norm2, block.norm2_context]


register(
    Kind(
        name="HunyuanVideo dual block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *DUAL) and tuple(parameters(m)) in DUALS,
        refuse=refuse_dual,
        patches=lambda block: [(block, "forward", DUALS[tuple(parameters(block))])],
        absorbs=absorbed_by_dual,
        # passes over (tokens, C): eager 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3) = 22, fused 2 + 4 + 3 = 9;
        # token replacement cuts and joins four times more, 2 each
        saving=lambda block: (
            (21 if FIRST_FRAME[1] in parameters(block) else 13) * block.norm2.normalized_shape[0] * itemsize(block)
        ),
        block=True,
    )
)


# The single block --------------------------------------------------------------------------------------------------


def single_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary = None,
    *args,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    return single(self, x, hidden_states.shape[1], temb, None, attention_mask, image_rotary_emb)


def token_replace_single_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    assert token_replace_emb is not None and num_tokens is not None  # the original needs them too
    x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    rows, index = two_rows(temb, token_replace_emb), row_index(x, num_tokens)
    return single(self, x, hidden_states.shape[1], rows, index, attention_mask, image_rotary_emb)


def single(
    block: Any,
    x: Tensor,
    video: int,
    temb: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    rotary: Rotary,
    more: Callable[[Tensor, Tensor], Tensor] = lambda attn_output, h: attn_output,
) -> tuple[Tensor, Tensor]:
    """Both streams joined, the video's tokens first; more: what stands between the attention and the last layer."""
    shift, scale, gate = block.norm.linear(block.norm.silu(temb)).chunk(3, dim=1)
    precision = law(block, x, gate)
    h = ops.norm_modulate(x, shift=shift, scale=scale, eps=block.norm.norm.eps, row_index=index, precision=precision)
    mlp = ops.activation(block.proj_mlp(h), "gelu_tanh")
    processor = block.attn.processor
    if isinstance(processor, Processor) and processor.replaced:  # takes both streams in one
        attn_output, _ = block.attn(hidden_states=h, attention_mask=mask, image_rotary_emb=rotary)
    else:
        attn_output = torch.cat(
            block.attn(
                hidden_states=h[:, :video],
                encoder_hidden_states=h[:, video:],
                attention_mask=mask,
                image_rotary_emb=rotary,
            ),
            dim=1,
        )
    y = block.proj_out(torch.cat([more(attn_output, h), mlp], dim=2))
    x = ops.gate_residual(x, y, gate, row_index=index, precision=precision)
    return x[:, :video], x[:, video:]


SINGLE = ("norm", "proj_mlp", "act_mlp", "proj_out", "attn")
SINGLES: dict[tuple[str, ...], Callable] = {
    (*START, "image_rotary_emb", *ANY): single_forward,
    (*START, "image_rotary_emb", *FIRST_FRAME): token_replace_single_forward,
}


def refuse_single(block: Any, *more: str) -> str | None:
    if type(block.act_mlp) is not nn.GELU or block.act_mlp.approximate != "tanh":
        return "its activation is not GELU (tanh)"
    return refuse_adaln(block.norm, 3) or unknown(block, *SINGLE, *more)


def absorbed_by_single(block: Any) -> list[Any]:
    return [block.norm, block.norm.norm, block.act_mlp]


register(
    Kind(
        name="HunyuanVideo single block",
        ops=("norm_modulate", "activation", "gate_residual"),
        match=lambda m: has(m, *SINGLE) and tuple(parameters(m)) in SINGLES,
        refuse=refuse_single,
        patches=lambda block: [(block, "forward", SINGLES[tuple(parameters(block))])],
        absorbs=absorbed_by_single,
        # passes over (tokens, C): eager norm 2, scale 2, shift 2, gate 2, add 3, two streams joined again twice 4,
        # token replacement twice more 4; fused 2 + 3
        saving=lambda block: (
            (14 if FIRST_FRAME[1] in parameters(block) else 10) * block.norm.norm.normalized_shape[0] * itemsize(block)
        ),
        block=True,
    )
)


# The text refiner --------------------------------------------------------------------------------------------------


def refiner_forward(self, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    gate1, gate2 = self.norm_out.linear(self.norm_out.nonlinearity(temb)).chunk(2, dim=1)
    precision = law(self, hidden_states, gate1, self.norm1.weight)
    first, second = ({"weight": n.weight, "bias": n.bias, "eps": n.eps} for n in (self.norm1, self.norm2))
    h = ops.norm_modulate(hidden_states, **first, precision=precision)
    attn_output = self.attn(hidden_states=h, encoder_hidden_states=None, attention_mask=attention_mask)
    x, h = ops.gate_residual_norm_modulate(hidden_states, attn_output, gate1, **second, precision=precision)
    return ops.gate_residual(x, self.ff(h), gate2, precision=precision)


REFINER = ("norm1", "attn", "norm2", "ff", "norm_out")


def refuse_refiner(block: Any) -> str | None:
    for norm in (block.norm1, block.norm2):
        if type(norm) is not nn.LayerNorm:
            return f"its norm is a {type(norm).__name__}, not a LayerNorm"
    return unknown(block.norm_out, "linear", "nonlinearity") or unknown(block, *REFINER)


register(
    Kind(
        name="HunyuanVideo text refiner block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: (
            has(m, *REFINER)
            and has(m.norm_out, "linear", "nonlinearity")
            and parameters(m) == ["hidden_states", "temb", "attention_mask"]
        ),
        refuse=refuse_refiner,
        patches=lambda block: [(block, "forward", refiner_forward)],
        absorbs=lambda block: [block.norm1, block.norm2, block.norm_out],
        # passes over (text tokens, C): eager 2*(norm 2, gate 2, add 3), fused 2 + 4 + 3
        saving=lambda block: 5 * block.norm1.normalized_shape[0] * itemsize(block),
        unit="text token",
        block=True,
    )
)
dual_forward.__name__ = image_dual_forward.__name__ = token_replace_dual_forward.__name__ = "forward"
single_forward.__name__ = token_replace_single_forward.__name__ = refiner_forward.__name__ = "forward"


# Patch embedding ---------------------------------------------------------------------------------------------------


def patch_convs(module: Any) -> list[nn.Module]:
    """The children of a module that holds nothing but projections with kernel = stride (Framepack: one per scale)."""
    children = list(module.named_children()) if isinstance(module, nn.Module) else []
    convs = [conv for name, conv in children if name.startswith("proj") and is_patch_conv(conv)]
    return convs if len(convs) == len(children) else []


def is_patch_conv(conv: nn.Module) -> bool:
    return isinstance(conv, nn.Conv3d) and conv.kernel_size == conv.stride


def refuse_patch_embedding(module: Any) -> str | None:
    for conv in patch_convs(module):
        plain = type(conv) is nn.Conv3d and conv.padding == (0, 0, 0) and conv.dilation == (1, 1, 1)
        if not plain or conv.groups != 1:
            return "its convolution is not a plain nn.Conv3d"
    return None


register(
    Kind(
        name="patch embedding (Conv3d, kernel = stride)",
        ops=("patch_embed3d",),
        match=lambda m: bool(patch_convs(m)),
        refuse=refuse_patch_embedding,
        patches=lambda module: [(conv, "forward", patch_conv_forward) for conv in patch_convs(module)],
    )
)
