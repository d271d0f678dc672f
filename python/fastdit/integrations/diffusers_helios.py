"""diffusers' HeliosTransformer3DModel: Wan's block over [history, video], where text may be for the video only."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations import wan_block
from fastdit.integrations.diffusers_processor import Processor
from fastdit.integrations.diffusers_wan import PROCESSORS, attend, register_block
from fastdit.integrations.joint import refuse_plain_norms
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# Attention --------------------------------------------------------------------------------------------------------


class FastditHeliosAttnProcessor(Processor):
    """HeliosAttnProcessor with `qk_norm_rope` and `attention`; where a history's keys are amplified, the original."""

    def __init__(self):
        from diffusers.models.transformers.transformer_helios import HeliosAttnProcessor

        super().__init__(HeliosAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        original_context_length: int | None = None,
    ) -> Tensor:
        amplified = attn.is_amplify_history and not attn.is_cross_attention
        if amplified or attention_mask is not None or attn.add_k_proj is not None or hidden_states.ndim != 3:
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, original_context_length
            )
        if rotary_emb is None:
            return attend(attn, hidden_states, encoder_hidden_states, None)
        cos, sin = rotary_emb.unsqueeze(-2).chunk(2, dim=-1)  # each (B, N, 1, D)
        return attend(attn, hidden_states, encoder_hidden_states, (cos, sin))


PROCESSORS["HeliosAttnProcessor"] = FastditHeliosAttnProcessor


# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Tensor,
    original_context_length: int | None = None,
) -> Tensor:
    def cross(h: Tensor) -> Tensor:
        if not self.guidance_cross_attn:
            return self.attn2(h, encoder_hidden_states, None, None, original_context_length)
        assert original_context_length is not None  # the original needs it too
        history = h.shape[1] - original_context_length
        y = self.attn2(h[:, history:], encoder_hidden_states, None, None, original_context_length)
        return nn.functional.pad(y, (0, 0, history, 0))

    tables, index = wan_block.six(self.scale_shift_table, temb)
    return wan_block.run(
        self,
        hidden_states,
        tables,
        index,
        (self.norm1, self.norm2, self.norm3),
        lambda h: self.attn1(h, None, None, rotary_emb, original_context_length),
        cross,
    )


block_forward.__name__ = "forward"

register_block(
    "Helios block",
    block_forward,
    ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb", "original_context_length"),
    "guidance_cross_attn",
)


# The output norm --------------------------------------------------------------------------------------------------


def norm_out_forward(self, hidden_states: Tensor, temb: Tensor, original_context_length: int) -> Tensor:
    x, temb = hidden_states[:, -original_context_length:], temb[:, -original_context_length:]
    table = self.scale_shift_table.to(temb.device) + temb.unsqueeze(2)
    shift, scale = table.to(x.device).unbind(2)
    return ops.norm_modulate(x, shift=shift, scale=scale, eps=self.norm.eps, precision=law(self, x, shift))


norm_out_forward.__name__ = "forward"

register(
    Kind(
        name="output norm (Helios)",
        ops=("norm_modulate",),
        match=lambda m: (
            has(m, "norm", "scale_shift_table")
            and parameters(m) == ["hidden_states", "temb", "original_context_length"]
        ),
        refuse=lambda m: refuse_plain_norms(m.norm) or unknown(m, "norm", "scale_shift_table"),
        patches=lambda m: [(m, "forward", norm_out_forward)],
        absorbs=lambda m: [m.norm],
        # passes over (tokens, C): cast 3, norm 4, scale 4, shift 4, cast 3 against 2
        saving=lambda m: 16 * m.scale_shift_table.shape[-1] * itemsize(m),
        precision="fp32",
    )
)
