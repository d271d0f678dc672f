"""diffusers' OmniGenTransformer2DModel: the block of a language model over text, images, time and the noisy image.

x = x + attention(n_1(x));    x = x + ff(n_2(x)),    RMSNorms with weights, no modulation
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_flux_attention import is_processor
from fastdit.integrations.diffusers_processor import Processor, queries_keys_values, refuse_choice, shared
from fastdit.integrations.joint import Stream, joint_attention
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.sandwich import prenorm_saving, refuse_norms
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block ---------------------------------------------------------------------------------------------------------


def block_forward(
    self, hidden_states: Tensor, attention_mask: Tensor | None, image_rotary_emb: tuple[Tensor, Tensor]
) -> Tensor:
    x, first, second = hidden_states, self.input_layernorm, self.post_attention_layernorm
    if x.dtype != first.weight.dtype:
        return original(self, x, attention_mask, image_rotary_emb)
    common: dict[str, Any] = dict(norm="rms", precision=law(self, x, second.weight))
    h = ops.norm_modulate(x, weight=first.weight, eps=first.eps, **common)
    y = self.self_attn(h, h, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)
    x, h = ops.gate_residual_norm_modulate(x, y, weight=second.weight, eps=second.eps, **common)
    return x + self.mlp(h)


block_forward.__name__ = "forward"

BLOCK = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def norms_of(block: Any) -> list[Any]:
    return [block.input_layernorm, block.post_attention_layernorm]


register(
    Kind(
        name="OmniGen block",
        ops=("norm_modulate", "gate_residual_norm_modulate"),
        match=lambda m: has(m, *BLOCK) and parameters(m) == ["hidden_states", "attention_mask", "image_rotary_emb"],
        refuse=lambda m: refuse_norms(*norms_of(m)) or unknown(m, *BLOCK),
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=norms_of,
        saving=lambda m: prenorm_saving(m, m.input_layernorm.weight.numel()),
        block=True,
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditOmniGenAttnProcessor(Processor):
    """OmniGenAttnProcessor2_0 with `qk_norm_rope` and `attention`.

    The pipeline's mask, causal over the text and full within each image, is served by runs of queries (masks.py).
    """

    def __init__(self):
        from diffusers.models.transformers.transformer_omnigen import OmniGenAttnProcessor2_0

        super().__init__(OmniGenAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None and attention_mask.ndim != 4:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        cos, sin = (None, None) if image_rotary_emb is None else (t.chunk(2, dim=-1)[0] for t in image_rotary_emb)
        q, k, v = queries_keys_values(attn, hidden_states, encoder_hidden_states)
        (o,) = joint_attention(Stream(q, k, v, cos=cos, sin=sin, layout="half"), attn_mask=attention_mask)
        return attn.to_out[0](o)


READS = frozenset(
    "shape to_q to_k to_v size heads view transpose embeddings apply_rotary_emb F scaled_dot_product_attention type_as "
    "reshape out_dim to_out".split()
)


def refuse_attention(attn: Any) -> str | None:
    if attn.inner_dim != attn.inner_kv_dim:
        return "its keys have fewer heads, which the original does not cover either"
    return refuse_choice(attn.processor)


register(
    Kind(
        name="attention (OmniGenAttnProcessor2_0)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "heads", "inner_dim", "inner_kv_dim", "processor")
            and is_processor(m.processor, READS, frozenset())
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditOmniGenAttnProcessor))],
        # q and k: negated half 1, cat 2, products 2 and 2, sum 3; in two bytes the latter are fp32 passes, 4 + 4 + 6,
        # and there are casts, 3 + 3 + 3; against 2
        saving=lambda attn: 2 * (24 if itemsize(attn) == 2 else 8) * attn.inner_dim * itemsize(attn),
        part=True,
    )
)
