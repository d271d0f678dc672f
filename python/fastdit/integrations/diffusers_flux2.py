"""diffusers' Flux2Transformer2DModel (FLUX.2 dev, klein): blocks whose modulation the model makes once for all of them.

The single block's attention and MLP share one projection before and one after: its processor is the whole sublayer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_flux import DOUBLE, double_block
from fastdit.integrations.diffusers_flux_attention import (
    MAY_READ,
    READS,
    FastditFluxAttnProcessor,
    is_processor,
    pairs,
)
from fastdit.integrations.diffusers_processor import Processor, refuse_choice, shared
from fastdit.integrations.joint import (
    Stream,
    Tables,
    clip_half,
    joint_attention,
    refuse_plain_norms,
    refuse_qk_norms,
    rotation_passes,
)
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, reads, unknown

# The double block --------------------------------------------------------------------------------------------------


def double_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    image, text = (Tables(*mod.chunk(6, dim=-1)) for mod in (temb_mod_img, temb_mod_txt))
    attention = dict(image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    return double_block(self, hidden_states, encoder_hidden_states, image, text, attention)


register(
    Kind(
        name="Flux.2 double block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: (
            has(m, *DOUBLE)
            and parameters(m)
            == [
                *("hidden_states", "encoder_hidden_states", "temb_mod_img", "temb_mod_txt"),
                *("image_rotary_emb", "joint_attention_kwargs"),
            ]
        ),
        refuse=lambda m: refuse_plain_norms(m.norm1, m.norm1_context, m.norm2, m.norm2_context) or unknown(m, *DOUBLE),
        patches=lambda block: [(block, "forward", double_forward)],
        absorbs=lambda block: [block.norm1, block.norm1_context, block.norm2, block.norm2_context],
        # passes over (tokens, C): eager 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3) = 22, fused 2 + 4 + 3 = 9
        saving=lambda block: 13 * block.norm2.normalized_shape[0] * itemsize(block),
        block=True,
    )
)


# The single block --------------------------------------------------------------------------------------------------


def single_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = temb_mod.chunk(3, dim=-1)
    precision = law(self, hidden_states, gate)
    h = ops.norm_modulate(hidden_states, shift=shift, scale=scale, eps=self.norm.eps, precision=precision)
    attn_output = self.attn(hidden_states=h, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x = clip_half(ops.gate_residual(hidden_states, attn_output, gate, precision=precision))
    return (x[:, :text_seq_len], x[:, text_seq_len:]) if split_hidden_states else x


double_forward.__name__ = single_forward.__name__ = "forward"

SINGLE = [
    *("hidden_states", "encoder_hidden_states", "temb_mod", "image_rotary_emb", "joint_attention_kwargs"),
    *("split_hidden_states", "text_seq_len"),
]
register(
    Kind(
        name="Flux.2 single block",
        ops=("norm_modulate", "gate_residual"),
        match=lambda m: has(m, "norm", "attn") and parameters(m) == SINGLE,
        refuse=lambda m: refuse_plain_norms(m.norm) or unknown(m, "norm", "attn"),
        patches=lambda block: [(block, "forward", single_forward)],
        absorbs=lambda block: [block.norm],
        # passes over (tokens, C): eager norm 2, scale 2, shift 2, gate 2, add 3, fused 2 + 3
        saving=lambda block: 6 * block.norm.normalized_shape[0] * itemsize(block),
        block=True,
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditFlux2AttnProcessor(FastditFluxAttnProcessor):
    """Flux2AttnProcessor, which is Flux.1's where there is text."""

    def __init__(self):
        from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor

        Processor.__init__(self, Flux2AttnProcessor())


class FastditFlux2ParallelSelfAttnProcessor(Processor):
    """Flux2ParallelSelfAttnProcessor with `qk_norm_rope`, `attention` and `activation`."""

    def __init__(self):
        from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttnProcessor

        super().__init__(Flux2ParallelSelfAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        h = attn.to_qkv_mlp_proj(hidden_states)
        qkv = 3 * attn.inner_dim  # in proportion: under tensor parallelism a rank has a share of both
        qkv = h.shape[-1] * qkv // (qkv + attn.mlp_hidden_dim * attn.mlp_mult_factor)
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in h[..., :qkv].chunk(3, dim=-1))
        cos, sin = (None, None) if image_rotary_emb is None else pairs(*image_rotary_emb)
        (o,) = joint_attention(Stream(q, k, v, attn.norm_q, attn.norm_k, cos, sin), attn_mask=attention_mask)
        gate, up = h[..., qkv:].chunk(2, dim=-1)
        return attn.to_out(torch.cat([o, ops.activation(gate, "silu", up=up)], dim=-1))


SINGLE_READS = frozenset(
    "to_qkv_mlp_proj inner_dim mlp_hidden_dim mlp_mult_factor shape torch split chunk unflatten norm_q norm_k "
    "apply_rotary_emb dispatch_attention_fn _attention_backend _parallel_config flatten to dtype mlp_act_fn cat "
    "to_out".split()
)


def norms_of(attn: Any) -> list[Any]:
    return [attn.norm_q, attn.norm_k, *([attn.norm_added_q, attn.norm_added_k] if has(attn, "norm_added_q") else [])]


def refuse_attention(attn: Any, known: frozenset[str], name: str) -> str | None:
    if not is_processor(attn.processor, known, MAY_READ):
        return f"its processor is {type(attn.processor).__name__}, not {name}"
    return refuse_choice(attn.processor) or refuse_qk_norms(*norms_of(attn))


def refuse_single_attention(attn: Any) -> str | None:
    if not is_swiglu(attn.mlp_act_fn) or attn.mlp_mult_factor != 2:
        return "its MLP is not SwiGLU"
    return refuse_attention(attn, SINGLE_READS, "Flux2ParallelSelfAttnProcessor")


register(
    Kind(
        name="attention (Flux2AttnProcessor)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "add_q_proj", "norm_added_q", "inner_dim", "heads", "head_dim", "processor")
            and not has(m, "pre_only")
        ),
        refuse=lambda attn: refuse_attention(attn, READS, "Flux2AttnProcessor"),
        patches=lambda attn: [(attn, "processor", shared(FastditFlux2AttnProcessor))],
        absorbs=norms_of,
        saving=lambda attn: rotation_passes(itemsize(attn)) * attn.inner_dim * itemsize(attn),
        part=True,
    )
)
register(
    Kind(
        name="attention and MLP (Flux2ParallelSelfAttnProcessor)",
        ops=("qk_norm_rope", "attention", "activation"),
        match=lambda m: has(m, "to_qkv_mlp_proj", "mlp_act_fn", "mlp_mult_factor", "norm_q", "head_dim", "processor"),
        refuse=refuse_single_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditFlux2ParallelSelfAttnProcessor))],
        absorbs=lambda attn: [*norms_of(attn), attn.mlp_act_fn, attn.mlp_act_fn.gate_fn],
        # and SwiGLU's product in a pass of its own, 3 less 1
        saving=lambda attn: (
            (rotation_passes(itemsize(attn)) * attn.inner_dim + 2 * attn.mlp_hidden_dim) * itemsize(attn)
        ),
        part=True,
    )
)


# SwiGLU between the linear layers of an MLP ------------------------------------------------------------------------


def swiglu_forward(self, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return ops.activation(gate, "silu", up=up)


swiglu_forward.__name__ = "forward"


def is_swiglu(module: Any) -> bool:
    """Without a projection of its own: SiLU of the first half of the channels times the second."""
    return (
        has(module, "gate_fn")
        and type(module.gate_fn) is nn.SiLU
        and parameters(module) == ["x"]
        and reads(type(module).forward) == {"shape", "gate_fn"}
    )


register(
    Kind(
        name="feed-forward activation (SwiGLU)",
        ops=("activation",),
        match=is_swiglu,
        refuse=lambda m: unknown(m, "gate_fn"),
        patches=lambda m: [(m, "forward", swiglu_forward)],
        absorbs=lambda m: [m.gate_fn],
        part=True,
    )
)
