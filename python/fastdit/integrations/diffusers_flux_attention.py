"""The attention of diffusers' Flux models: text and image normed, rotated and joined, text first."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdit.integrations.diffusers_processor import Processor, refuse_choice, shared
from fastdit.integrations.joint import (
    Stream,
    joint_attention,
    projections,
    refuse_qk_norms,
    rotation_passes,
    text_projections,
)
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, reads


class FastditFluxAttnProcessor(Processor):
    """FluxAttnProcessor with `qk_norm_rope` and `attention`; a mask keeps diffusers' attention behind the former."""

    def __init__(self):
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

        super().__init__(FluxAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if (encoder_hidden_states is None) != (attn.added_kv_proj_dim is None):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        cos, sin = (None, None) if image_rotary_emb is None else pairs(*image_rotary_emb)
        if encoder_hidden_states is None:
            image = Stream(*projections(attn, hidden_states), attn.norm_q, attn.norm_k, cos, sin)
            return joint_attention(image, attn_mask=attention_mask)[0]
        n = encoder_hidden_states.shape[1]
        rows = (None,) * 4 if cos is None or sin is None else (cos[:n], sin[:n], cos[n:], sin[n:])
        text = Stream(*text_projections(attn, encoder_hidden_states), attn.norm_added_q, attn.norm_added_k, *rows[:2])
        image = Stream(*projections(attn, hidden_states), attn.norm_q, attn.norm_k, *rows[2:])
        context, x = joint_attention(text, image, attn_mask=attention_mask)
        return attn.to_out[1](attn.to_out[0](x)), attn.to_add_out(context)


def pairs(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """One value per pair of channels, of tables (N, D) that hold each twice."""
    return cos[:, 0::2], sin[:, 0::2]


# What the processor's call reads. Copies of it (Bria, LongCat, Ovis) count heads instead of channels.
READS = frozenset(
    "_get_qkv_projections unflatten norm_q norm_k added_kv_proj_dim norm_added_q norm_added_k torch cat "
    "apply_rotary_emb dispatch_attention_fn _attention_backend _parallel_config flatten to dtype split_with_sizes "
    "shape to_out to_add_out".split()
)
MAY_READ = frozenset(("heads", "head_dim", "contiguous"))


def is_processor(processor: Any, known: frozenset[str] = READS, optional: frozenset[str] = MAY_READ) -> bool:
    """Does the processor's call read what the known one reads? Copies of one original do."""
    return reads(type(processor).__call__) - optional == known


def norms_of(attn: Any) -> list[Any]:
    added = [attn.norm_added_q, attn.norm_added_k] if attn.added_kv_proj_dim is not None else []
    return [attn.norm_q, attn.norm_k, *added]


def matches_attention(module: Any) -> bool:
    """Flux's own class of attention whatever its processor, or the general one with a processor like Flux's."""
    names = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "heads", "inner_dim", "processor", "added_kv_proj_dim")
    if not has(module, *names, "pre_only", "context_pre_only"):
        return False
    return not has(module, "spatial_norm") or is_processor(module.processor)


def refuse_attention(attn: Any) -> str | None:
    if not is_processor(attn.processor):
        return f"its processor is {type(attn.processor).__name__}, not FluxAttnProcessor"
    if attn.pre_only == (attn.added_kv_proj_dim is not None):
        return "it has an output projection without text, or text without one"
    return refuse_choice(attn.processor) or refuse_qk_norms(*norms_of(attn))


register(
    Kind(
        name="attention (FluxAttnProcessor)",
        ops=("qk_norm_rope", "attention"),
        match=matches_attention,
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditFluxAttnProcessor))],
        absorbs=norms_of,
        saving=lambda attn: rotation_passes(itemsize(attn)) * attn.inner_dim * itemsize(attn),
        part=True,
    )
)
