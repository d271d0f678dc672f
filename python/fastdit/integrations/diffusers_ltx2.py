"""diffusers' LTX2VideoTransformer3DModel (LTX-2, 2.3, 2.5): a video and an audio stream that attend to each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_ltx import pair_tables, refuse_attention, refuse_rms_norms
from fastdit.integrations.diffusers_processor import Processor, queries_keys_values, shared
from fastdit.integrations.diffusers_wan import normed
from fastdit.integrations.padding import is_lengths
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown
from fastdit.integrations.timestep_rows import PerToken, register_model, with_index

# The block --------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A shift, scale or gate: (B, M, C), where M is 1 or the number of tokens, or rows (R, C) by index (B, N)."""

    values: Tensor
    row_index: Tensor | None = None


def rows(table: Tensor, temb: Tensor | PerToken) -> list[Table]:
    """table (n, C) + temb (B, M, n * C), or its few rows: n tables."""
    few, index = with_index(temb)
    tables = table.to(few.device) + few.unflatten(-1, (table.shape[0], -1))
    return [Table(values, index) for values in tables.unbind(-2)]


def opened(block: Any, norm: Any, x: Tensor, shift: Table, scale: Table) -> Tensor:
    """What enters a sublayer."""
    return ops.norm_modulate(
        x,
        shift=shift.values,
        scale=scale.values,
        norm="rms",
        eps=norm.eps,
        row_index=shift.row_index,
        precision=law(block, x, shift.values),
    )


def seam(
    block: Any, norm: Any, x: Tensor, y: Tensor, gate: Table | None, shift: Table | None, scale: Table | None
) -> tuple[Tensor, Tensor]:
    """x + gate * y, and what enters the next sublayer."""
    if gate is not None and gate.row_index is None and shift is not None and shift.row_index is not None:
        gate = indexed(gate.values, x)
    return ops.gate_residual_norm_modulate(
        x,
        y,
        None if gate is None else gate.values,
        shift=None if shift is None else shift.values,
        scale=None if scale is None else scale.values,
        norm="rms",
        eps=norm.eps,
        gate_row_index=None if gate is None else gate.row_index,
        row_index=None if shift is None else shift.row_index,
        precision=law(block, y, x),
    )


def indexed(values: Tensor, x: Tensor) -> Table:
    """(B, M, C) for x (B, N, C) in rows by index, as the tables beside it."""
    batch, count, channels = values.shape
    index = torch.arange(batch * count, device=x.device).view(batch, count)
    return Table(values.reshape(-1, channels), index.repeat_interleave(x.shape[1] // count, dim=1))


def text_attention(
    block: Any, name: str, x: Tensor, y: Tensor, tables: list[Table], text: Tensor, mask: Tensor | None,
    temb: Tensor | None,
) -> tuple[Tensor, Tensor, Table | None]:  # fmt: skip
    """Closes self-attention y, then reads the text: x, the attention's output and its gate."""
    shift, scale, gate = tables[6:9] if getattr(block, f"{name or 'video_'}cross_attn_adaln") else (None, None, None)
    x, h = seam(block, getattr(block, f"{name}norm2"), x, y, tables[2], shift, scale)
    if block.cross_attn_adaln:
        table = getattr(block, f"{name}prompt_scale_shift_table")
        if temb is None:  # the same for all samples and timesteps
            shift_text, scale_text = table[None, None].to(device=x.device, dtype=x.dtype).unbind(2)
        else:
            shift_text, scale_text = (t.values for t in rows(table, temb))
        text = text * (1 + scale_text) + shift_text  # a few hundred tokens, without a norm
    return x, getattr(block, f"{name}attn2")(h, text, mask, None), gate


def block_forward(
    self,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    temb: Tensor | PerToken,
    temb_audio: Tensor | PerToken,
    temb_ca_scale_shift: Tensor | PerToken,
    temb_ca_audio_scale_shift: Tensor | PerToken,
    temb_ca_gate: Tensor | PerToken,
    temb_ca_audio_gate: Tensor | PerToken,
    temb_prompt: Tensor | None = None,
    temb_prompt_audio: Tensor | None = None,
    video_rotary_emb: tuple[Tensor, Tensor] | None = None,
    audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ca_video_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ca_audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    self_attention_mask: Tensor | None = None,
    audio_self_attention_mask: Tensor | None = None,
    a2v_cross_attention_mask: Tensor | None = None,
    v2a_cross_attention_mask: Tensor | None = None,
    use_a2v_cross_attention: bool = True,
    use_v2a_cross_attention: bool = True,
    perturbation_mask: Tensor | None = None,
    all_perturbed: bool | None = None,
) -> tuple[Tensor, Tensor]:
    video, audio = rows(self.scale_shift_table, temb), rows(self.audio_scale_shift_table, temb_audio)
    # autocast: the tables are fp32, and widen the streams
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, video[0].values.dtype))
    a = audio_hidden_states.to(torch.promote_types(audio_hidden_states.dtype, audio[0].values.dtype))
    perturbed = dict(perturbation_mask=perturbation_mask, all_perturbed=all_perturbed) if self.perturbed_attn else {}

    h = opened(self, self.norm1, x, *video[:2])
    y = self.attn1(h, None, self_attention_mask, video_rotary_emb, **perturbed)
    h = opened(self, self.audio_norm1, a, *audio[:2])
    z = self.audio_attn1(h, None, audio_self_attention_mask, audio_rotary_emb, **perturbed)

    x, y, gate = text_attention(self, "", x, y, video, encoder_hidden_states, encoder_attention_mask, temb_prompt)
    a, z, audio_gate = text_attention(
        self, "audio_", a, z, audio, audio_encoder_hidden_states, audio_encoder_attention_mask, temb_prompt_audio
    )

    if use_a2v_cross_attention or use_v2a_cross_attention:
        table, audio_table = self.video_a2v_cross_attn_scale_shift_table, self.audio_a2v_cross_attn_scale_shift_table
        q_scale, q_shift, kv_scale, kv_shift = rows(table[:4], temb_ca_scale_shift)
        audio_kv_scale, audio_kv_shift, audio_q_scale, audio_q_shift = rows(audio_table[:4], temb_ca_audio_scale_shift)
        norm, audio_norm = self.audio_to_video_norm, self.video_to_audio_norm
        # both read the streams as they are before either adds to them
        x, video_q = seam(self, norm, x, y, gate, q_shift, q_scale)
        a, audio_q = seam(self, audio_norm, a, z, audio_gate, audio_q_shift, audio_q_scale)
        y = z = gate = audio_gate = None
        video_kv = opened(self, norm, x, kv_shift, kv_scale) if use_v2a_cross_attention else None
        if use_a2v_cross_attention:
            h = opened(self, audio_norm, a, audio_kv_shift, audio_kv_scale)
            (gate,) = rows(table[4:], temb_ca_gate)
            y = self.audio_to_video_attn(video_q, h, a2v_cross_attention_mask, ca_video_rotary_emb, ca_audio_rotary_emb)
        if use_v2a_cross_attention:
            (audio_gate,) = rows(audio_table[4:], temb_ca_audio_gate)
            z = self.video_to_audio_attn(
                audio_q, video_kv, v2a_cross_attention_mask, ca_audio_rotary_emb, ca_video_rotary_emb
            )

    return (
        feed_forward(self, "", x, y, gate, video),
        feed_forward(self, "audio_", a, z, audio_gate, audio),
    )


def feed_forward(block: Any, name: str, x: Tensor, y: Tensor | None, gate: Table | None, tables: list[Table]) -> Tensor:
    """Closes the sublayer y, if there is one left open, and runs the last."""
    norm, (shift, scale, last) = getattr(block, f"{name}norm3"), tables[3:6]
    if y is None:
        h = opened(block, norm, x, shift, scale)
    else:
        x, h = seam(block, norm, x, y, gate, shift, scale)
    y = getattr(block, f"{name}ff")(h)
    return ops.gate_residual(x, y, last.values, row_index=last.row_index, precision=law(block, y, x))


block_forward.__name__ = "forward"

ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
NORMS = (
    *("norm1", "norm2", "norm3", "audio_norm1", "audio_norm2", "audio_norm3"),
    *("audio_to_video_norm", "video_to_audio_norm"),
)
TABLES = (
    *("scale_shift_table", "audio_scale_shift_table"),
    *("video_a2v_cross_attn_scale_shift_table", "audio_a2v_cross_attn_scale_shift_table"),
)
BLOCK = (*ATTENTIONS, *NORMS, *TABLES, "ff", "audio_ff")
SETTINGS = ("perturbed_attn", "cross_attn_adaln", "video_cross_attn_adaln", "audio_cross_attn_adaln")
PROMPT = ("prompt_scale_shift_table", "audio_prompt_scale_shift_table")
CALL = list(block_forward.__code__.co_varnames[1 : block_forward.__code__.co_argcount])


def refuse_block(block: Any) -> str | None:
    return refuse_rms_norms(*(getattr(block, name) for name in NORMS)) or unknown(block, *BLOCK, *SETTINGS, *PROMPT)


register(
    Kind(
        name="LTX-2 block",
        ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"),
        match=lambda m: has(m, *BLOCK, *SETTINGS) and parameters(m) == CALL,
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [getattr(block, name) for name in NORMS],
        # passes over the video's (tokens, C) in 2 bytes: 4 norms 15 each (diffusers_ltx), 4 modulations 4 each, 3 gates
        # 2 each, 4 sums 3 each: 94, fused 2 + 4 + 4 + 2 + 4 + 3
        saving=lambda block: 75 * block.scale_shift_table.shape[-1] * itemsize(block),
        block=True,
    )
)
register_model("a timestep per token (LTX-2)", CALL, refuse_block)


# Attention --------------------------------------------------------------------------------------------------------


class FastditLTX2AttnProcessor(Processor):
    """LTX2AudioVideoAttnProcessor and LTX2PerturbedAttnProcessor with `qk_norm_rope` and `attention`.

    Masks that are no lengths and perturbation go to the original.
    """

    def __init__(self):
        from diffusers.models.transformers.transformer_ltx2 import LTX2PerturbedAttnProcessor

        super().__init__(LTX2PerturbedAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> Tensor:
        masked = attention_mask is not None and not is_lengths(attention_mask)
        perturbed = perturbation_mask is not None or (all_perturbed is not None and all_perturbed is not False)
        if masked or perturbed or (attn.rope_type == "split" and is_flat(query_rotary_emb, key_rotary_emb)):
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb,
                perturbation_mask, all_perturbed,
            )  # fmt: skip
        q, k, v = queries_keys_values(attn, hidden_states, encoder_hidden_states)
        q, k = normed(q, k, attn.norm_q, attn.norm_k, **rotation(attn, query_rotary_emb, key_rotary_emb))
        o = ops.attention(q, k, v, kv_len=attention_mask)
        if attn.to_gate_logits is not None:
            o = o * (2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))).unsqueeze(-1)  # one factor per head
        return attn.to_out[1](attn.to_out[0](o.flatten(2)))


def is_flat(*rotaries: tuple[Tensor, Tensor] | None) -> bool:
    """Tables (B, N, C/2), which rotate halves of all heads together, in place of (B, H, N, D/2)."""
    return any(rotary is not None and rotary[0].ndim != 4 for rotary in rotaries)


def rotation(attn: Any, rotary: tuple[Tensor, Tensor] | None, k_rotary: tuple[Tensor, Tensor] | None) -> dict:
    """Arguments of `qk_norm_rope`: tables, of their own for keys from the other stream, and their layout."""
    split = attn.rope_type == "split"
    (cos, sin), (k_cos, k_sin) = (
        tuple(t.transpose(1, 2) for t in given) if split and given is not None else pair_tables(given, attn.heads)
        for given in (rotary, None if rotary is None else k_rotary)
    )
    return dict(cos=cos, sin=sin, k_cos=k_cos, k_sin=k_sin, layout="half" if split else "interleaved")


PROCESSORS = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")
ATTENTION = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads", "processor", "to_gate_logits", "rope_type")

register(
    Kind(
        name="attention (LTX2Attention)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: has(m, *ATTENTION),
        refuse=lambda attn: refuse_attention(attn, *PROCESSORS),
        patches=lambda attn: [(attn, "processor", shared(FastditLTX2AttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        saving=lambda attn: 27 * attn.inner_dim * itemsize(attn),  # as in diffusers_ltx
        part=True,
    )
)
