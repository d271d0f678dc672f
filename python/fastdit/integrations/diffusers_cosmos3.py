"""diffusers' Cosmos3OmniTransformer: the layer of two pathways and its packed attention.

    x = x + attention(n(x));    x = x + mlp(n(x))

Text and what is generated, each (N, C), without a batch, have weights of their own. Text attends to itself, causally;
what is generated, to both. The timestep is added to the tokens once, so nothing is modulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_processor import Processor, refuse_processor, shared
from fastdit.integrations.joint import head_norms, is_diffusers_rms
from fastdit.integrations.probe import follows, numbers
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.sandwich import prenorm_saving, refuse_norms
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

Rotary = tuple[Tensor, Tensor, Tensor, Tensor]

# Norms -------------------------------------------------------------------------------------------------------------


def is_nemotron(norm: Any) -> bool:
    """An RMSNorm that rounds once, after its weight."""
    if not has(norm, "weight", "eps") or parameters(norm) != ["hidden_states"]:
        return False
    x, weight = numbers(2, 3), numbers(3, seed=1)
    normed = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.5)
    return follows(norm, dict(weight=weight, eps=0.5), (x,), normed)


def refuse_rms(*norms: Any) -> str | None:
    return refuse_norms(*(norm for norm in norms if is_diffusers_rms(norm) or not is_nemotron(norm)))


def rms(self: Any, norm: Any, *tokens: Tensor) -> dict[str, Any]:
    """What the modulated operators take for the norm of these tokens."""
    precision = law(self, *tokens, norm.weight) if is_diffusers_rms(norm) else "fp32"
    return dict(weight=norm.weight, norm="rms", eps=norm.eps, precision=precision)


# The layer ---------------------------------------------------------------------------------------------------------


def layer_forward(self, und_seq: Tensor, gen_seq: Tensor, rotary_emb: Rotary) -> tuple[Tensor, Tensor]:
    und = ops.norm_modulate(und_seq, **rms(self, self.input_layernorm, und_seq))
    gen = ops.norm_modulate(gen_seq, **rms(self, self.input_layernorm_moe_gen, gen_seq))
    und, gen = self.self_attn(und, gen, rotary_emb)
    return (
        closed(self, und_seq, und, self.post_attention_layernorm, self.mlp),
        closed(self, gen_seq, gen, self.post_attention_layernorm_moe_gen, self.mlp_moe_gen),
    )


def closed(self: Any, x: Tensor, y: Tensor, norm: Any, mlp: Callable[[Tensor], Tensor]) -> Tensor:
    """From the attention's output to the end of the layer."""
    x, h = ops.gate_residual_norm_modulate(x, y, **rms(self, norm, x, y))
    return x + mlp(h)


layer_forward.__name__ = "forward"

NORMS = ("input_layernorm", "input_layernorm_moe_gen", "post_attention_layernorm", "post_attention_layernorm_moe_gen")
LAYER = ("self_attn", "mlp", "mlp_moe_gen", *NORMS)


def layer_norms(layer: Any) -> list[Any]:
    return [getattr(layer, name) for name in NORMS]


register(
    Kind(
        name="Cosmos 3 layer",
        ops=("norm_modulate", "gate_residual_norm_modulate"),
        match=lambda m: has(m, *LAYER) and parameters(m) == ["und_seq", "gen_seq", "rotary_emb"],
        refuse=lambda m: refuse_rms(*layer_norms(m)) or unknown(m, *LAYER),
        patches=lambda layer: [(layer, "forward", layer_forward)],
        absorbs=layer_norms,
        saving=lambda layer: prenorm_saving(layer, layer.input_layernorm.weight.numel()),
        block=True,
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditCosmos3AttnProcessor(Processor):
    """Cosmos3AttnProcessor with `qk_norm_rope` and `attention`; heads of keys and values are not repeated."""

    name = "Cosmos3AttnProcessor"

    def __init__(self):
        from diffusers.models.transformers.transformer_cosmos3 import Cosmos3AttnProcessor

        super().__init__(Cosmos3AttnProcessor())

    def __call__(self, attn: Any, und_seq: Tensor, gen_seq: Tensor, rotary_emb: Rotary) -> tuple[Tensor, Tensor]:
        q, k, v = projected(attn, und_seq, attn.to_q, attn.to_k, attn.to_v)
        q_gen, k_gen, v_gen = projected(attn, gen_seq, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norm = attn.k_norm_und_for_gen  # the few keys of the text, normed apart for what is generated: once as queries
        k_und = None if norm is None else rotated(k, k, norm, norm, *rotary_emb[:2])[0]
        q, k = rotated(q, k, attn.norm_q, attn.norm_k, *rotary_emb[:2])
        k_und = k if k_und is None else k_und
        q_gen, k_gen = rotated(q_gen, k_gen, attn.norm_added_q, attn.norm_added_k, *rotary_emb[2:])
        und = ops.attention(q[None], k[None], v[None], frame_tokens=1)
        gen = ops.attention(q_gen[None], torch.cat([k_und, k_gen])[None], torch.cat([v, v_gen])[None])
        return attn.to_out(und[0].flatten(1)), attn.to_add_out(gen[0].flatten(1))


def projected(attn: Any, x: Tensor, *layers: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Each (N, H, D)."""
    return [layer(x).unflatten(-1, (-1, attn.head_dim)) for layer in layers]


def rotated(q: Tensor, k: Tensor, norm_q: Any, norm_k: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables (N, D) hold each value twice; eager's products with them round to the model's dtype."""
    norms = {} if type(norm_q) is nn.Identity else head_norms(norm_q, norm_k, q.dtype)
    precision = norms.pop("precision", "native" if cos.dtype == q.dtype else "fp32")
    cos, sin = (table[:, : table.shape[1] // 2] for table in (cos, sin))
    if precision == "fp32":
        wide = torch.promote_types(cos.dtype, torch.float32)
        cos, sin = cos.to(wide), sin.to(wide)
    return ops.qk_norm_rope(q, k, **norms, cos=cos, sin=sin, layout="half", precision=precision)


def head_norms_of(attn: Any) -> list[Any]:
    """Of text's queries and keys, of what is generated, and of text's keys for what is generated."""
    norms = [attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k, attn.k_norm_und_for_gen]
    return [norm for norm in norms if norm is not None]


def refuse_attention(attn: Any) -> str | None:
    text = (attn.norm_q, attn.norm_k)
    norms = head_norms_of(attn)
    if all(type(norm) is nn.Identity for norm in text):
        norms = norms[2:]
    elif attn.k_norm_und_for_gen is not None:
        return "it norms the keys of its text twice"
    if len({(type(norm), getattr(norm, "eps", None)) for norm in norms}) != 1:
        return "its query and key norms differ"
    return refuse_processor(attn.processor, FastditCosmos3AttnProcessor.name) or refuse_rms(*norms)


register(
    Kind(
        name=f"attention ({FastditCosmos3AttnProcessor.name})",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_out", "add_q_proj", "to_add_out", "norm_q", "norm_added_q", "k_norm_und_for_gen")
            and has(m, "head_dim", "num_attention_heads", "num_key_value_heads", "processor")
            and parameters(m) == ["und_seq", "gen_seq", "rotary_emb"]
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditCosmos3AttnProcessor))],
        absorbs=head_norms_of,
        # passes over q and over k: the norm 17 (with casts to fp32) or 7, halves negated and joined 3, products 2 and
        # 2, sum 3; ours 2
        saving=lambda attn: (
            (25 if itemsize(attn) == 2 else 15)
            * (attn.num_attention_heads + attn.num_key_value_heads)
            * attn.head_dim
            * itemsize(attn)
        ),
        part=True,
    )
)
