"""diffusers' CogView3PlusTransformer2DModel, CogView4Transformer2DModel and GlmImageTransformer2DModel.

One block of two streams: one layer makes the twelve tables, one attention and one MLP serve both image and text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.integrations.diffusers_cogvideox import refuse_attention, text_first
from fastdit.integrations.diffusers_processor import Processor, refuse_processor, shared
from fastdit.integrations.joint import Tables, clip_half, close_stream, open_stream, refuse_plain_norms, rotation_passes
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block --------------------------------------------------------------------------------------------------------


def two_streams(self, x: Tensor, context: Tensor, temb: Tensor, attention: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Image and text after one block; attention: further arguments of `self.attn1`."""
    (norm, norm_context), (image, text) = first_norms(self.norm1), tables(self.norm1, temb)
    precision = law(self, x, image.gate1)
    a, c = self.attn1(
        hidden_states=open_stream(x, image, norm, precision),
        encoder_hidden_states=open_stream(context, text, norm_context, precision),
        **attention,
    )
    x = close_stream(x, a, image, self.norm2, self.ff, precision)
    return x, close_stream(context, c, text, self.norm2_context, self.ff, precision)


def first_norms(zero: Any) -> tuple[Any, Any]:
    return (zero.norm_x, zero.norm_c) if has(zero, "norm_x") else (zero.norm, zero.norm_context)


def tables(zero: Any, temb: Tensor) -> tuple[Tables, Tables]:
    """Of image and text: CogView3+'s one after the other, the others' in turns, and their models apply the SiLU."""
    if has(zero, "silu"):
        rows = zero.linear(zero.silu(temb)).chunk(12, dim=1)
        return Tables(*rows[:6]), Tables(*rows[6:])
    rows = zero.linear(temb).chunk(12, dim=1)
    return Tables(*rows[0::2]), Tables(*rows[1::2])


def cogview3_forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
    x, context = two_streams(self, hidden_states, encoder_hidden_states, emb, {})
    return clip_half(x), clip_half(context)


def cogview4_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    attention_mask: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    assert temb is not None
    options = dict(image_rotary_emb=image_rotary_emb, attention_mask=attention_mask, **(attention_kwargs or {}))
    return two_streams(self, hidden_states, encoder_hidden_states, temb, options)


def glm_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    attention_mask: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
    kv_cache: Any = None,
) -> tuple[Tensor, Tensor]:
    options = dict(attention_kwargs or {}, kv_cache=kv_cache)
    return cogview4_forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_mask, options)


glm_forward.__name__ = "forward"
cogview3_forward.__name__ = cogview4_forward.__name__ = "forward"

BLOCK = ("norm1", "attn1", "norm2", "norm2_context", "ff")
STREAMS = ["hidden_states", "encoder_hidden_states"]
CALL4 = [*STREAMS, "temb", "image_rotary_emb", "attention_mask", "attention_kwargs"]


def is_zero(zero: Any, silu: bool) -> bool:
    pairs = ("norm_x", "norm_c") if silu else ("norm", "norm_context")
    return has(zero, "linear", *pairs) and has(zero, "silu") is silu


def refuse_block(block: Any) -> str | None:
    zero, known = block.norm1, ("silu", "linear", "norm_x", "norm_c", "norm", "norm_context")
    if has(zero, "silu") and type(zero.silu) is not nn.SiLU:
        return f"its modulation has a {type(zero.silu).__name__}, not SiLU"
    if why := refuse_plain_norms(*first_norms(zero), block.norm2, block.norm2_context):
        return why
    if zero.linear.out_features != 12 * block.norm2.normalized_shape[0]:
        return "its modulation does not make twelve tables of the tokens' width"
    return unknown(zero, *known) or unknown(block, *BLOCK)


def register_block(name: str, forward: Any, call: list[str], silu: bool) -> None:
    register(
        Kind(
            name=name,
            ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
            match=lambda m: has(m, *BLOCK) and is_zero(m.norm1, silu) and parameters(m) == call,
            refuse=refuse_block,
            patches=lambda block: [(block, "forward", forward)],
            absorbs=lambda block: [block.norm1, *first_norms(block.norm1), block.norm2, block.norm2_context],
            # passes over (tokens, C): eager 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3) = 22, fused 2 + 4 + 3 = 9
            saving=lambda block: 13 * block.norm2.normalized_shape[0] * itemsize(block),
            block=True,
        )
    )


register_block("CogView3+ block", cogview3_forward, [*STREAMS, "emb"], silu=True)
register_block("CogView4 block", cogview4_forward, CALL4, silu=False)
register_block("GLM-Image block", glm_forward, [*CALL4, "kv_cache"], silu=False)


# Attention --------------------------------------------------------------------------------------------------------


class FastditCogView4AttnProcessor(Processor):
    """CogView4AttnProcessor with `qk_norm_rope` and `attention` over [text, image]; masks go to the original."""

    def __init__(self):
        from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor

        super().__init__(CogView4AttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        cos, sin = halves(image_rotary_emb, hidden_states.device)
        return text_first(attn, hidden_states, encoder_hidden_states, cos, sin, layout="half")


class FastditGlmImageAttnProcessor(Processor):
    """GlmImageAttnProcessor likewise; with a cache of keys and values the original."""

    def __init__(self):
        from diffusers.models.transformers.transformer_glm_image import GlmImageAttnProcessor

        super().__init__(GlmImageAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        kv_cache: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None or kv_cache is not None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, kv_cache)
        cos, sin = halves(image_rotary_emb, hidden_states.device)
        return text_first(attn, hidden_states, encoder_hidden_states, cos, sin, layout="half")


def halves(rotary: Any, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """One value per pair of channels, of tables (N, D) that hold each twice, one half after the other."""
    if rotary is None:
        return None, None
    cos, sin = (t[:, : t.shape[1] // 2].to(device) for t in rotary)
    return cos, sin


PROCESSORS = {
    "CogView4AttnProcessor": FastditCogView4AttnProcessor,
    "GlmImageAttnProcessor": FastditGlmImageAttnProcessor,
}


def register_attention(name: str, processor: type) -> None:
    register(
        Kind(
            name=f"attention ({name})",
            ops=("qk_norm_rope", "attention"),
            match=lambda m: (
                has(m, "to_q", "to_k", "to_v", "to_out", "heads", "processor", "norm_q", "norm_k", "is_cross_attention")
                and type(m.processor).__name__ == name
            ),
            refuse=lambda attn: refuse_processor(attn.processor, name) or refuse_attention(attn),
            patches=lambda attn: [(attn, "processor", shared(processor))],
            absorbs=lambda attn: [attn.norm_q, attn.norm_k],
            saving=lambda attn: rotation_passes(itemsize(attn)) * attn.inner_dim * itemsize(attn),
            part=True,
        )
    )


for _name, _processor in PROCESSORS.items():
    register_attention(_name, _processor)
