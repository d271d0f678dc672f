"""diffusers' QwenImageTransformer2DModel (text to image, edit, layered) and its ControlNets: block and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.integrations.diffusers_flux_attention import is_processor, norms_of
from fastdit.integrations.diffusers_processor import Processor, refuse_choice, shared
from fastdit.integrations.joint import (
    Stream,
    Tables,
    clip_half,
    close_stream,
    complex_rotation_saving,
    joint_attention,
    open_stream,
    projections,
    refuse_plain_norms,
    refuse_qk_norms,
    text_projections,
)
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block ---------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    image = Tables(*self.img_mod(temb).chunk(6, dim=-1))
    text = Tables(*self.txt_mod(temb.chunk(2, dim=0)[0] if self.zero_cond_t else temb).chunk(6, dim=-1))
    rows = None if modulate_index is None else table_rows(modulate_index)
    precision = law(self, hidden_states, image.gate1)
    text_precision = law(self, encoder_hidden_states, text.gate1)
    attn_output, context_attn_output = self.attn(
        hidden_states=open_stream(hidden_states, image, self.img_norm1, precision, rows),
        encoder_hidden_states=open_stream(encoder_hidden_states, text, self.txt_norm1, text_precision),
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x = close_stream(hidden_states, attn_output, image, self.img_norm2, self.img_mlp, precision, rows)
    context = close_stream(
        encoder_hidden_states, context_attn_output, text, self.txt_norm2, self.txt_mlp, text_precision
    )
    return clip_half(context), clip_half(x)


block_forward.__name__ = "forward"


def table_rows(index: Tensor) -> Tensor:
    """Row of each token (B, N) in the tables (2 B, C): those of the samples' own timestep, then those of timestep 0."""
    samples = index.shape[0]
    return torch.arange(samples, device=index.device)[:, None] + samples * (index != 0)


BLOCK = ("img_mod", "img_norm1", "attn", "img_norm2", "img_mlp", "txt_mod", "txt_norm1", "txt_norm2", "txt_mlp")
PARAMETERS = [
    *("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb"),
    *("image_rotary_emb", "joint_attention_kwargs", "modulate_index"),
]


def refuse_block(block: Any) -> str | None:
    for mod in (block.img_mod, block.txt_mod):
        if type(mod) is not nn.Sequential or [type(m) for m in mod][:1] != [nn.SiLU] or len(mod) != 2:
            return f"its modulation is a {type(mod).__name__}, not SiLU and a linear layer"
    norms = refuse_plain_norms(block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2)
    return norms or unknown(block, *BLOCK, "zero_cond_t")


register(
    Kind(
        name="Qwen-Image block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *BLOCK, "zero_cond_t") and parameters(m) == PARAMETERS,
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2],
        # passes over (tokens, C): eager 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3) = 22, fused 2 + 4 + 3 = 9; an
        # index of rows makes six dense tables, written and read
        saving=lambda block: (25 if block.zero_cond_t else 13) * block.img_norm1.normalized_shape[0] * itemsize(block),
        block=True,
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditQwenAttnProcessor(Processor):
    """QwenDoubleStreamAttnProcessor2_0 with `qk_norm_rope` and `attention`; the mask over the text, which may have any
    pattern, becomes key lengths: text goes last, its valid keys first."""

    def __init__(self):
        from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

        super().__init__(QwenDoubleStreamAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if encoder_hidden_states is None or attention_mask is not None:
            return self.original(
                attn,
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                attention_mask,
                image_rotary_emb,
            )
        image_rope, text_rope = ((None, None),) * 2 if image_rotary_emb is None else map(real_pair, image_rotary_emb)
        x, context = joint_attention(
            Stream(*projections(attn, hidden_states), attn.norm_q, attn.norm_k, *image_rope),
            Stream(*text_projections(attn, encoder_hidden_states), attn.norm_added_q, attn.norm_added_k, *text_rope),
            key_mask=encoder_hidden_states_mask,
        )
        x = attn.to_out[0](x)
        return attn.to_out[1](x) if len(attn.to_out) > 1 else x, attn.to_add_out(context)


def real_pair(freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (N, D/2), of complex exponentials."""
    return freqs.real, freqs.imag


READS = frozenset(
    "ValueError shape torch ones bool device cat to_q to_k to_v add_q_proj add_k_proj add_v_proj inner_dim heads "
    "unflatten norm_q norm_k norm_added_q norm_added_k apply_rotary_emb_qwen dispatch_attention_fn _attention_backend "
    "_parallel_config flatten to dtype to_out contiguous len to_add_out".split()
)


register(
    Kind(
        name="attention (QwenDoubleStreamAttnProcessor2_0)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "add_q_proj", "to_add_out", "norm_added_q", "inner_dim", "heads", "processor")
            and is_processor(m.processor, READS, frozenset())
        ),
        refuse=lambda attn: refuse_choice(attn.processor) or refuse_qk_norms(*norms_of(attn)),
        patches=lambda attn: [(attn, "processor", shared(FastditQwenAttnProcessor))],
        absorbs=norms_of,
        saving=complex_rotation_saving,
        part=True,
    )
)
