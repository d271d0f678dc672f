"""diffusers' ZImageTransformer2DModel (Z-Image, Omni) and its ControlNet: block, attention, output layer.

Norms stand before and after each sublayer; modulation is a scale and a tanh gate, of the sample or, in Omni, of the
noisy and the clean tokens apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_flux_attention import is_processor
from fastdit.integrations.diffusers_processor import Processor, refuse_choice, shared
from fastdit.integrations.joint import (
    Stream,
    complex_rotation_saving,
    joint_attention,
    projections,
    refuse_plain_norms,
    refuse_qk_norms,
)
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.sandwich import refuse_norms, sandwich_block, saving
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block ---------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    if x.dtype != self.attention_norm1.weight.dtype:
        return original(self, x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)
    tables = rows = None
    if self.modulation:
        tables, rows = modulation(self.adaLN_modulation, adaln_input, noise_mask, adaln_noisy, adaln_clean)

    def attend(h: Tensor) -> Tensor:
        return self.attention(h, attention_mask=attn_mask, freqs_cis=freqs_cis)

    return sandwich_block(self, x, norms_of(self), attend, self.feed_forward, tables, rows)


def modulation(
    layer: Any, c: Tensor | None, noise_mask: Tensor | None, noisy: Tensor | None, clean: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The tables, and the row of each token (B, N) where noisy and clean tokens differ: rows (2 B, C), noisy first."""
    if noise_mask is None or noisy is None or clean is None:
        return layer(c), None
    samples = noise_mask.shape[0]
    rows = torch.arange(samples, device=noise_mask.device)[:, None] + samples * (noise_mask != 1)
    return layer(torch.cat([noisy, clean])), rows


NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")  # before and after each sublayer
BLOCK = ("attention", "feed_forward", *NORMS, "modulation")
TOKENS = ["noise_mask", "adaln_noisy", "adaln_clean"]


def norms_of(block: Any) -> list[Any]:
    return [getattr(block, name) for name in NORMS]


register(
    Kind(
        name="Z-Image block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *BLOCK) and parameters(m) == ["x", "attn_mask", "freqs_cis", "adaln_input", *TOKENS],
        refuse=lambda m: refuse_norms(*norms_of(m)) or unknown(m, *BLOCK, "adaLN_modulation"),
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=norms_of,
        saving=lambda block: saving(block, block.attention_norm1.weight.numel(), block.modulation),
        block=True,
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditZAttnProcessor(Processor):
    """ZSingleStreamAttnProcessor with `qk_norm_rope` and `attention`.

    The model's own masks, (B, N) of booleans, say how many tokens a sample has; diffusers' attention serves any other.
    """

    def __init__(self):
        from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

        super().__init__(ZSingleStreamAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        cos, sin = (None, None) if freqs_cis is None else (freqs_cis.real.unsqueeze(2), freqs_cis.imag.unsqueeze(2))
        stream = Stream(*projections(attn, hidden_states), attn.norm_q, attn.norm_k, cos, sin)
        if attention_mask is None or (attention_mask.ndim == 2 and attention_mask.dtype == torch.bool):
            lengths = None if attention_mask is None else attention_mask.sum(1, dtype=torch.int32)
            (o,) = joint_attention(stream, kv_len=lengths)
        else:
            mask = attention_mask[:, None, None, :] if attention_mask.ndim == 2 else attention_mask
            (o,) = joint_attention(stream, attn_mask=mask)
        o = attn.to_out[0](o)
        return attn.to_out[1](o) if len(attn.to_out) > 1 else o


READS = frozenset(
    "to_q to_k to_v unflatten heads norm_q norm_k torch Tensor dtype to ndim dispatch_attention_fn _attention_backend "
    "_parallel_config flatten to_out len".split()
)


register(
    Kind(
        name="attention (ZSingleStreamAttnProcessor)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "inner_dim", "heads", "processor")
            and is_processor(m.processor, READS, frozenset())
        ),
        refuse=lambda attn: refuse_choice(attn.processor) or refuse_qk_norms(attn.norm_q, attn.norm_k),
        patches=lambda attn: [(attn, "processor", shared(FastditZAttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        saving=complex_rotation_saving,
        part=True,
    )
)


# The output layer --------------------------------------------------------------------------------------------------


def final_forward(
    self,
    x: Tensor,
    c: Tensor | None = None,
    noise_mask: Tensor | None = None,
    c_noisy: Tensor | None = None,
    c_clean: Tensor | None = None,
) -> Tensor:
    scale, rows = modulation(self.adaLN_modulation, c, noise_mask, c_noisy, c_clean)
    h = ops.norm_modulate(x, scale=scale, eps=self.norm_final.eps, row_index=rows, precision=law(self, x, scale))
    return self.linear(h)


for function in (block_forward, final_forward):
    function.__name__ = "forward"

FINAL = ("norm_final", "linear", "adaLN_modulation")
register(
    Kind(
        name="Z-Image output layer (norm, modulation)",
        ops=("norm_modulate",),
        match=lambda m: has(m, *FINAL) and parameters(m) == ["x", "c", "noise_mask", "c_noisy", "c_clean"],
        refuse=lambda m: refuse_plain_norms(m.norm_final) or unknown(m, *FINAL),
        patches=lambda m: [(m, "forward", final_forward)],
        absorbs=lambda m: [m.norm_final],
        saving=lambda m: 2 * m.norm_final.normalized_shape[0] * itemsize(m),  # norm 2, scale 2 against 2
    )
)
