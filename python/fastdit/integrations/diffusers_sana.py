"""diffusers' SanaTransformer2DModel and SanaVideoTransformer3DModel: block, cross-attention, output norm.

Self-attention is linear and feed-forward convolves: both are called as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdit import ops
from fastdit.integrations.adaln_single import refuse_table, sublayers
from fastdit.integrations.diffusers_processor import Processor, queries_keys_values, refuse_choice, shared
from fastdit.integrations.diffusers_wan import normed
from fastdit.integrations.joint import is_diffusers_rms, refuse_plain_norms
from fastdit.integrations.padding import is_lengths
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block --------------------------------------------------------------------------------------------------------


def image_forward(
    self,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,  # the model always gives it
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    def feed_forward(h: Tensor) -> Tensor:
        pictures = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # channels last in memory
        return self.ff(pictures).permute(0, 2, 3, 1).flatten(1, 2).contiguous()

    return sublayers(
        self,
        hidden_states,
        timestep,
        self.attn1,
        lambda x: self.attn2(x, encoder_hidden_states, encoder_attention_mask),
        feed_forward,
    )


def video_forward(
    self,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,  # the model always gives it
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    return sublayers(
        self,
        hidden_states,
        timestep,
        lambda h: self.attn1(h, rotary_emb=rotary_emb),
        lambda x: self.attn2(x, encoder_hidden_states, encoder_attention_mask),
        lambda h: self.ff(h.unflatten(1, (frames, height, width))).flatten(1, 3).contiguous(),
    )


image_forward.__name__ = video_forward.__name__ = "forward"

BLOCK = ("norm1", "attn1", "norm2", "attn2", "ff", "scale_shift_table")
CALL = ["hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "timestep"]
FORWARDS = {
    (*CALL, "height", "width"): image_forward,
    (*CALL, "frames", "height", "width", "rotary_emb"): video_forward,
}

register(
    Kind(
        name="Sana block",
        ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"),
        match=lambda m: has(m, *BLOCK) and tuple(parameters(m)) in FORWARDS,
        refuse=lambda block: (
            refuse_plain_norms(block.norm1, block.norm2) or refuse_table(block) or unknown(block, *BLOCK)
        ),
        patches=lambda block: [(block, "forward", FORWARDS[tuple(parameters(block))])],
        absorbs=lambda block: [block.norm1, block.norm2],
        saving=lambda block: 13 * block.scale_shift_table.shape[-1] * itemsize(block),  # as in diffusers_pixart
        block=True,
    )
)


# Cross-attention --------------------------------------------------------------------------------------------------


class FastditSanaAttnProcessor(Processor):
    """SanaAttnProcessor2_0 with `qk_norm_rope` and `attention`; masks that are no lengths go to the original."""

    def __init__(self):
        from diffusers.models.transformers.transformer_sana_video import SanaAttnProcessor2_0

        super().__init__(SanaAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None and not is_lengths(attention_mask):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask)
        q, k, v = queries_keys_values(attn, hidden_states, encoder_hidden_states)
        if attn.norm_q is not None:
            q, k = normed(q, k, attn.norm_q, attn.norm_k)
        o = ops.attention(q, k, v, kv_len=attention_mask).flatten(2)
        o = attn.to_out[1](attn.to_out[0](o))
        return o if attn.rescale_output_factor == 1.0 else o / attn.rescale_output_factor


def refuse_attention(attn: Any) -> str | None:
    if chosen := refuse_choice(attn.processor):
        return chosen
    norms = (attn.norm_q, attn.norm_k)
    if norms == (None, None):
        return None
    if not all(is_diffusers_rms(norm) and norm.dim == (attn.inner_dim,) for norm in norms):
        return "its norms are not diffusers' RMSNorm over all heads"
    return None if norms[0].eps == norms[1].eps else "its norms have two eps"


register(
    Kind(
        name="cross-attention (SanaAttnProcessor2_0)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "heads", "processor", "norm_q", "norm_k", "rescale_output_factor")
            and type(m.processor).__name__ == "SanaAttnProcessor2_0"
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditSanaAttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        # q in 2 bytes: norm to fp32 3, square 4, mean 2, product 3, weight 2, against 2
        saving=lambda attn: 0 if attn.norm_q is None else 12 * attn.inner_dim * itemsize(attn),
        part=True,
    )
)


# The output norm --------------------------------------------------------------------------------------------------


def norm_out_forward(self, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
    """temb (B, C) or (B, M, C), table (2, C)."""
    shift, scale = (scale_shift_table + temb.unsqueeze(-2).to(scale_shift_table.device)).unbind(-2)
    precision = law(self, hidden_states, scale)
    return ops.norm_modulate(hidden_states, shift=shift, scale=scale, eps=self.norm.eps, precision=precision)


norm_out_forward.__name__ = "forward"

register(
    Kind(
        name="output norm (SanaModulatedNorm)",
        ops=("norm_modulate",),
        match=lambda m: has(m, "norm") and parameters(m) == ["hidden_states", "temb", "scale_shift_table"],
        refuse=lambda m: refuse_plain_norms(m.norm) or unknown(m, "norm"),
        patches=lambda m: [(m, "forward", norm_out_forward)],
        absorbs=lambda m: [m.norm],
        # norm 2, scale 2, shift 2, against 2; without parameters of its own, in 2 bytes as released
        saving=lambda m: 4 * m.norm.normalized_shape[0] * 2,
    )
)
