"""diffusers' BriaFibo2Transformer2DModel: Z-Image's block, with attention to the text inside some, and the Perceiver.

Tokens of the image are noisy, those of the gist and of the images to edit are clean: two rows per sample, and the row
of each token. The output layer is Z-Image's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_processor import Processor, queries_keys_values, refuse_processor, shared
from fastdit.integrations.diffusers_z_image import NORMS, TOKENS, modulation, norms_of
from fastdit.integrations.joint import affine, complex_rotation_saving, head_norms, refuse_qk_norms
from fastdit.integrations.masks import valid_first
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.sandwich import Between, refuse_norms, sandwich_block, saving
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The blocks --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    if x.dtype != self.attention_norm1.weight.dtype:
        clean_and_text = (adaln_clean, encoder_hidden_states, encoder_attention_mask)
        return original(self, x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, *clean_and_text)
    tables, rows = modulation(self.adaLN_modulation, adaln_input, noise_mask, adaln_noisy, adaln_clean)

    def attend(h: Tensor) -> Tensor:
        return self.attention(h, attention_mask=attn_mask, freqs_cis=freqs_cis)

    def cross(h: Tensor) -> Tensor:
        return self.cross_attention(
            h, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )

    between = None
    if self.cross_attention is not None:
        between = Between(self.cross_attn_norm1, cross, self.cross_attn_norm2, self.cross_attn_gate)
    return sandwich_block(self, x, norms_of(self), attend, self.feed_forward, tables, rows, between)


def perceiver_forward(
    self,
    latents: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    if latents.dtype != self.ffn_norm.weight.dtype:
        return original(self, latents, encoder_hidden_states, encoder_attention_mask, attention_mask)
    first, second, third = perceiver_norms(self)
    h = ops.norm_modulate(latents, **affine(first, law(self, latents)))
    y = self.cross_attention(h, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    precision = law(self, latents, y)
    latents, h = ops.gate_residual_norm_modulate(latents, y, **affine(second, precision))
    y = self.self_attention(h, attention_mask=attention_mask)
    latents, h = ops.gate_residual_norm_modulate(latents, y, **affine(third, precision))
    return latents + self.ffn(h)


block_forward.__name__ = perceiver_forward.__name__ = "forward"

BLOCK = ("attention", "feed_forward", *NORMS, "adaLN_modulation", "cross_attention")
CROSS = ("cross_attn_norm1", "cross_attn_norm2")
TEXT = ["encoder_hidden_states", "encoder_attention_mask"]
PERCEIVER = ("self_attn_norm", "self_attention", "cross_attn_norm", "cross_attention", "ffn_norm", "ffn")


def block_norms(block: Any) -> list[Any]:
    return [*norms_of(block), *(getattr(block, name) for name in CROSS if block.cross_attention is not None)]


def perceiver_norms(layer: Any) -> list[Any]:
    return [layer.cross_attn_norm, layer.self_attn_norm, layer.ffn_norm]


register(
    Kind(
        name="Bria FIBO 2 block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: (
            has(m, *BLOCK) and parameters(m) == ["x", "attn_mask", "freqs_cis", "adaln_input", *TOKENS, *TEXT]
        ),
        refuse=lambda m: refuse_norms(*block_norms(m)) or unknown(m, *BLOCK, *CROSS, "cross_attn_gate"),
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=block_norms,
        # with a cross-attention two norms, a gate and a sum more, not counted
        saving=lambda block: saving(block, block.attention_norm1.weight.numel(), modulated=True),
        block=True,
    )
)
register(
    Kind(
        name="Bria FIBO 2 Perceiver layer",
        ops=("norm_modulate", "gate_residual_norm_modulate"),
        match=lambda m: (
            has(m, *PERCEIVER)
            and parameters(m) == ["latents", "encoder_hidden_states", "encoder_attention_mask", "attention_mask"]
        ),
        refuse=lambda m: refuse_norms(*perceiver_norms(m)) or unknown(m, *PERCEIVER),
        patches=lambda layer: [(layer, "forward", perceiver_forward)],
        absorbs=perceiver_norms,
        # passes over (gist tokens, C): three norms (17 with casts to fp32, or 7) and three sums 3; ours 2 + 4 + 4 + 3
        saving=lambda layer: (47 if itemsize(layer) == 2 else 17) * layer.ffn_norm.weight.numel() * itemsize(layer),
        block=True,
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditBriaFibo2AttnProcessor(Processor):
    """BriaFibo2AttnProcessor with `qk_norm_rope` and `attention`.

    Masks, (B, N) of booleans, become key lengths: the model's own have their padding last, those of the text may have
    any pattern. Others go to the original.
    """

    name = "BriaFibo2AttnProcessor"

    def __init__(self):
        from diffusers.models.transformers.transformer_bria_fibo2 import BriaFibo2AttnProcessor

        super().__init__(BriaFibo2AttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        mask = attention_mask
        if mask is not None and (mask.ndim != 2 or mask.dtype is not torch.bool):
            return self.original(attn, hidden_states, encoder_hidden_states, mask, freqs_cis)
        q, k, v = queries_keys_values(attn, hidden_states, encoder_hidden_states)
        rope: dict[str, Any] = {}
        if freqs_cis is not None:
            rope = dict(cos=freqs_cis.real.unsqueeze(2), sin=freqs_cis.imag.unsqueeze(2))
        q, k = ops.qk_norm_rope(q, k, **head_norms(attn.norm_q, attn.norm_k, q.dtype), **rope)
        lengths = None
        if mask is not None and encoder_hidden_states is None:
            lengths = mask.sum(1, dtype=torch.int32)
        elif mask is not None:
            lengths, k, v = valid_first(mask, k, v)
        return attn.to_out[0](ops.attention(q, k, v, kv_len=lengths).flatten(2))


register(
    Kind(
        name=f"attention ({FastditBriaFibo2AttnProcessor.name})",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads", "processor")
            and type(m.processor).__name__ == FastditBriaFibo2AttnProcessor.name
        ),
        refuse=lambda attn: (
            refuse_processor(attn.processor, FastditBriaFibo2AttnProcessor.name)
            or refuse_qk_norms(attn.norm_q, attn.norm_k)
        ),
        patches=lambda attn: [(attn, "processor", shared(FastditBriaFibo2AttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        # of those that rotate
        saving=lambda attn: complex_rotation_saving(attn, attn.heads * attn.norm_q.weight.numel()),
        part=True,
    )
)
