"""diffusers' ErnieImageTransformer2DModel: block, attention, output norm, and tables that stay one row per sample.

    x = x + gate * attention(n(x) * (1 + scale) + shift);    likewise the feed-forward

Tokens come as (N, B, C) and the model writes each table out for all of them. Here blocks compute on (B, N, C), which
the transposed output of the one before is in memory, and read the rows (B, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_processor import Processor, refuse_processor, shared
from fastdit.integrations.joint import affine, head_norms, projections, refuse_plain_norms, refuse_qk_norms
from fastdit.integrations.masks import is_key_mask
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.sandwich import refuse_norms
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block ---------------------------------------------------------------------------------------------------------


def block_forward(
    self, x: Tensor, rotary_pos_emb: Tensor, temb: Sequence[Tensor], attention_mask: Tensor | None = None
) -> Tensor:
    if x.dtype != self.adaLN_sa_ln.weight.dtype:
        return original(self, x, rotary_pos_emb, temb, attention_mask)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = (rows(table) for table in temb)
    x = x.transpose(0, 1)
    precision = law(self, x, scale)
    h = ops.norm_modulate(x, shift=shift, scale=scale, **affine(self.adaLN_sa_ln, precision))
    y = self.self_attention(h, attention_mask=attention_mask, image_rotary_emb=rotary_pos_emb)
    x, h = ops.gate_residual_norm_modulate(
        x, y, gate, shift=ff_shift, scale=ff_scale, **affine(self.adaLN_mlp_ln, precision)
    )
    return ops.gate_residual(x, self.mlp(h), ff_gate, precision=precision).transpose(0, 1)


def rows(table: Tensor) -> Tensor:
    """(N, B, C) -> (B, C) where all tokens of a sample are one row in memory, as `expand` makes them, or (B, N, C)."""
    return table[0] if table.stride(0) == 0 else table.transpose(0, 1)


BLOCK = ("adaLN_sa_ln", "self_attention", "adaLN_mlp_ln", "mlp")


def is_block(module: Any) -> bool:
    return has(module, *BLOCK) and parameters(module) == ["x", "rotary_pos_emb", "temb", "attention_mask"]


def refuse_block(block: Any) -> str | None:
    return refuse_norms(block.adaLN_sa_ln, block.adaLN_mlp_ln) or unknown(block, *BLOCK)


register(
    Kind(
        name="ERNIE-Image block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=is_block,
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.adaLN_sa_ln, block.adaLN_mlp_ln],
        # passes over (tokens, C) in two bytes: 2 norms 17, modulation (casts 3, 3, 3 and 3, sum of scale 4, product 6,
        # sum 6) and gates (casts 3, 3 and 3, product 6, sum 3); in four 7, 8 and 6; fused 2 + 4 + 3
        saving=lambda block: (117 if itemsize(block) == 2 else 33) * block.adaLN_sa_ln.weight.numel() * itemsize(block),
        precision="fp32",
        block=True,
    )
)


# Modulation, which all blocks share --------------------------------------------------------------------------------


class Unwritten(Tensor):
    """A tensor whose `contiguous()` leaves it as it is: expanded rows stay as few in memory."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.contiguous:
            with torch._C.DisableTorchFunctionSubclass():  # as_subclass(Tensor) would break a compiled graph
                return args[0].view_as(args[0])
        return super().__torch_function__(func, types, args, kwargs or {})


def modulation_forward(self, input: Tensor) -> Tensor:
    return original(self, input).as_subclass(Unwritten)


def refuse_modulation(model: Any) -> str | None:
    return "none of its blocks is known" if all(map(refuse_block, model.layers)) else None


register(
    Kind(
        name="modulation of samples (ERNIE-Image)",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: (
            has(m, "adaLN_modulation", "layers", "final_norm")
            and isinstance(m.layers, nn.ModuleList)
            and all(map(is_block, m.layers))
        ),
        refuse=refuse_modulation,
        patches=lambda m: [(m.adaLN_modulation, "forward", modulation_forward)],
        # six tables that are not written, and not read by the blocks
        saving=lambda m: 6 * (1 + len(m.layers)) * m.layers[0].adaLN_sa_ln.weight.numel() * itemsize(m),
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditErnieImageAttnProcessor(Processor):
    """ErnieImageSingleStreamAttnProcessor with `qk_norm_rope` and `attention`.

    The mask that the model makes, (B, 1, 1, N) of booleans, has its padding last; any other goes to the original.
    """

    name = "ErnieImageSingleStreamAttnProcessor"

    def __init__(self):
        from diffusers.models.transformers.transformer_ernie_image import ErnieImageSingleStreamAttnProcessor

        super().__init__(ErnieImageSingleStreamAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None and not is_key_mask(attention_mask):
            return self.original(attn, hidden_states, attention_mask, freqs_cis)
        q, k, v = projections(attn, hidden_states)
        q, k = rotated(q, attn.norm_q, freqs_cis), rotated(k, attn.norm_k, freqs_cis)
        lengths = None if attention_mask is None else attention_mask.flatten(1).sum(1, dtype=torch.int32)
        return attn.to_out[0](ops.attention(q, k, v, kv_len=lengths).flatten(2))


def rotated(x: Tensor, norm: Any, angles: Tensor | None) -> Tensor:
    """n(x) (B, N, H, D) with each of the first R channels turned by an angle of its own, of angles (B, N, 1, R).

        y_i = x_i cos a_i - x_j sin a_i,    y_j = x_j cos a_j + x_i sin a_j,    j = i + R / 2

    No rotation: a_i and a_j differ. Turned by the first half of the angles and by the second, each gives half of y.
    """
    norms = head_norms(norm, norm, x.dtype)
    if angles is None:
        return ops.qk_norm_rope(x, x[:, :0], **norms)[0]
    half = angles.shape[-1] // 2
    (cos, k_cos), (sin, k_sin) = angles.cos().chunk(2, dim=-1), angles.sin().chunk(2, dim=-1)
    first, second = ops.qk_norm_rope(x, x, **norms, cos=cos, sin=sin, k_cos=k_cos, k_sin=k_sin, layout="half")
    return torch.cat([first[..., :half], second[..., half:]], dim=-1)


register(
    Kind(
        name=f"attention ({FastditErnieImageAttnProcessor.name})",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads", "inner_dim", "processor")
            and type(m.processor).__name__ == FastditErnieImageAttnProcessor.name
        ),
        refuse=lambda attn: (
            refuse_processor(attn.processor, FastditErnieImageAttnProcessor.name)
            or refuse_qk_norms(attn.norm_q, attn.norm_k)
        ),
        patches=lambda attn: [(attn, "processor", shared(FastditErnieImageAttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        # passes over q and over k: norm 2, halves negated and joined 3, products 4, sum 3, joined 2; ours 2, 2 and 2
        saving=lambda attn: 2 * 8 * attn.inner_dim * itemsize(attn),
        part=True,
    )
)


# The output norm ---------------------------------------------------------------------------------------------------


def final_forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
    scale, shift = self.linear(conditioning).chunk(2, dim=-1)
    x = x.transpose(0, 1)
    h = ops.norm_modulate(x, shift=shift, scale=scale, **affine(self.norm, law(self, x, scale)))
    return h.transpose(0, 1)


for function in (block_forward, modulation_forward, final_forward):
    function.__name__ = "forward"

register(
    Kind(
        name="output norm (ERNIE-Image)",
        ops=("norm_modulate",),
        match=lambda m: has(m, "norm", "linear") and parameters(m) == ["x", "conditioning"],
        refuse=lambda m: refuse_plain_norms(m.norm) or unknown(m, "norm", "linear"),
        patches=lambda m: [(m, "forward", final_forward)],
        absorbs=lambda m: [m.norm],
        # passes over (tokens, C): norm 2, scale 2, shift 2 against 2
        saving=lambda m: 4 * m.norm.normalized_shape[0] * itemsize(m),
    )
)
