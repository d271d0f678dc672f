"""Wan's own repositories (Wan-Video/Wan2.1, Wan2.2): WanAttentionBlock, its attentions, the head.

Their residual stream becomes fp32 with the first gate, whatever the dtype of the weights; the linear layers run under
autocast. Rotary tables are complex fp64 and made anew for each sample in each attention; here they stay compact, one
row per position along each axis. Lengths and grids come as host tensors: reading them waits for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations import wan_block
from fastdit.integrations.diffusers_wan import TEXT_TOKENS, normed
from fastdit.integrations.probe import follows, numbers
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import autocasted, has, itemsize, parameters, reads, unknown
from fastdit.integrations.wan_block import Rows

# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self, x: Tensor, e: Tensor | Rows, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor, context: Tensor,
    context_lens: Tensor | None,
) -> Tensor:  # fmt: skip
    tables, index = wan_block.six(self.modulation, e)
    return wan_block.run(
        self,
        x.to(torch.promote_types(x.dtype, tables[0].dtype)),
        tables,
        index,
        (self.norm1, self.norm3, self.norm2),
        lambda h: self.self_attn(autocasted(h), seq_lens, grid_sizes, freqs),
        lambda h: self.cross_attn(h, context, context_lens),
    )


BLOCK = ("norm1", "self_attn", "norm3", "cross_attn", "norm2", "ffn", "modulation")
TAKEN = ["x", "e", "seq_lens", "grid_sizes", "freqs", "context", "context_lens"]


def is_block(block: Any) -> bool:
    """Wan 2.1 gives a row (6, C) per sample, Wan 2.2 per token."""
    x, e, table = numbers(2, 3, 4), numbers(2, 3, 6, 4, seed=1), numbers(1, 6, 4, seed=2)
    parts: dict[str, Any] = dict(
        norm1=torch.sin, norm3=torch.cos, norm2=torch.tanh, ffn=torch.square, modulation=table,
        self_attn=lambda h, lens, grids, freqs: h + h.mean(dim=1, keepdim=True) + lens + grids + freqs,
        cross_attn=lambda h, context, lens: h * context + lens,
    )  # fmt: skip
    for rows in (e, e[:, :1].squeeze(1)):
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (table + rows).view(2, -1, 6, 4).unbind(2)
        y = x + gate * parts["self_attn"](x.sin() * (1 + scale) + shift, 1, 2, 3)
        y = y + y.cos() * 4 + 5
        y = y + ffn_gate * (y.tanh() * (1 + ffn_scale) + ffn_shift).square()
        if follows(block, parts, (x, rows, 1, 2, 3, 4, 5), y):
            return True
    return False


def refuse_block(block: Any) -> str | None:
    if not is_block(block):
        return "its forward computes something else than a WanAttentionBlock"
    settings = ("dim", "ffn_dim", "num_heads", "window_size", "qk_norm", "cross_attn_norm", "eps")
    return wan_block.refuse_norms(block.norm1, block.norm3, block.norm2) or unknown(block, *BLOCK, *settings)


wan_block.register_block(
    "WanAttentionBlock (Wan-Video)",
    "modulation",
    block_forward,
    lambda m: has(m, *BLOCK) and parameters(m) == TAKEN,
    refuse_block,
)


# Attention --------------------------------------------------------------------------------------------------------


def self_attention_forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
    heads = (self.num_heads, -1)
    q, k, v = (layer(x).unflatten(-1, heads) for layer in (self.q, self.k, self.v))
    q, k = normed(q, k, *weighted(self.norm_q, self.norm_k), **rotary(freqs, grid_sizes.tolist(), q))
    return self.o(ops.attention(q, k, v, kv_len=lengths(seq_lens, k)).flatten(2))


def cross_attention_forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:
    heads, image = (self.num_heads, -1), None
    if hasattr(self, "k_img"):  # the CLIP tokens stand before the text
        split = context.shape[1] - TEXT_TOKENS
        image, context = context[:, :split], context[:, split:]
    q, k, v = self.q(x).unflatten(-1, heads), self.k(context).unflatten(-1, heads), self.v(context).unflatten(-1, heads)
    q, k = normed(q, k, *weighted(self.norm_q, self.norm_k))
    o = ops.attention(q, k, v, kv_len=lengths(context_lens, k)).flatten(2)
    if image is not None:
        k, v = self.k_img(image).unflatten(-1, heads), self.v_img(image).unflatten(-1, heads)
        _, k = normed(k[:, :0], k, *weighted(None, self.norm_k_img))
        o = o + ops.attention(q, k, v).flatten(2)
    return self.o(o)


def weighted(*norms: Any) -> tuple[Any, ...]:
    return tuple(norm if has(norm, "weight") else None for norm in norms)


def rotary(freqs: Tensor, grids: list[list[int]], q: Tensor) -> dict[str, Any]:
    """freqs (1024, D/2), complex: a row per position, the columns of the three axes side by side."""
    half = freqs.shape[1]
    parts = freqs.split([half - 2 * (half // 3), half // 3, half // 3], dim=1)
    sizes = grids[0]
    if all(grid == sizes for grid in grids):
        axes = [t.float() for part, n in zip(parts, sizes, strict=True) for t in (part[:n].real, part[:n].imag)]
        grid = torch.tensor([sizes], dtype=torch.int32).to(q.device, non_blocking=True)
        return dict(axes=axes, grids=grid, rope_len=sizes[0] * sizes[1] * sizes[2])
    tables = [torch.ones(q.shape[1], half, dtype=freqs.dtype, device=q.device) for _ in grids]  # padding: as it is
    for table, (t, h, w) in zip(tables, grids, strict=True):
        angles = [
            part[:n].view(*(n if i == j else 1 for j in range(3)), -1).expand(t, h, w, -1)
            for i, (part, n) in enumerate(zip(parts, (t, h, w), strict=True))
        ]
        table[: t * h * w] = torch.cat(angles, dim=-1).flatten(0, 2)
    table = torch.stack(tables).unsqueeze(2)  # (B, N, 1, D/2)
    return dict(cos=table.real.float(), sin=table.imag.float())


def lengths(lens: Tensor | None, k: Tensor) -> Tensor | None:
    """Valid keys of each sample on the device; None where all are."""
    if lens is None or all(n == k.shape[1] for n in lens.tolist()):
        return None
    return lens.to(k.device, torch.int32, non_blocking=True)


def refuse_attention(attn: Any) -> str | None:
    if tuple(attn.window_size) != (-1, -1):
        return f"its window_size is {tuple(attn.window_size)}, not (-1, -1)"
    norms = [attn.norm_q, attn.norm_k, *([attn.norm_k_img] if hasattr(attn, "norm_k_img") else [])]
    x, weight = numbers(2, 3, 4), numbers(4, seed=1)
    for norm in norms:
        expected = x * (x.square().mean(dim=-1, keepdim=True) + getattr(norm, "eps", 0.0)).rsqrt() * weight
        if not isinstance(norm, nn.Identity) and not follows(norm, dict(weight=weight), (x,), expected):
            return f"its norm of q and k is a {type(norm).__name__}, not RMSNorm"
    if len({(type(norm), getattr(norm, "eps", None)) for norm in norms}) > 1:
        return "its norms of q and k differ"
    children = ("q", "k", "v", "o", "norm_q", "norm_k", "k_img", "v_img", "norm_k_img")
    return unknown(attn, *children, "num_heads", "head_dim", "window_size")


def is_self(attn: Any) -> bool:
    return parameters(attn) == ["x", "seq_lens", "grid_sizes", "freqs"]


register(
    Kind(
        name="attention (Wan-Video)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "q", "k", "v", "o", "norm_q", "norm_k", "num_heads", "window_size")
            and (is_self(m) or parameters(m) == ["x", "context", "context_lens"])
        ),
        refuse=refuse_attention,
        patches=lambda m: [(m, "forward", self_attention_forward if is_self(m) else cross_attention_forward)],
        absorbs=lambda m: [m.norm_q, m.norm_k, *([m.norm_k_img] if hasattr(m, "norm_k_img") else [])],
        # q and k: norm 2, then casts to fp64, complex products, a cast back to fp32 (at least 14 passes) against 2
        saving=lambda m: 2 * 14 * m.num_heads * m.head_dim * itemsize(m),
        part=True,
    )
)


# The head ---------------------------------------------------------------------------------------------------------


def modulated(head: Any, x: Tensor, e: Tensor | Rows) -> Tensor:
    e, index = e if isinstance(e, Rows) else (e.unsqueeze(-2), None)
    shift, scale = (head.modulation + e.float()).unbind(dim=-2)
    return ops.norm_modulate(x, shift=shift, scale=scale, eps=head.norm.eps, row_index=index)


def head_forward(self, x: Tensor, e: Tensor | Rows) -> Tensor:
    with torch.autocast("cuda", dtype=torch.float32, enabled=x.is_cuda):  # the last projection is fp32
        return self.head(modulated(self, x, e))


def plain_head_forward(self, x: Tensor, e: Tensor | Rows) -> Tensor:
    """diffusers' Wan-Animate-2: the projection in the dtype of the tokens."""
    return self.head(modulated(self, x, e))


def refuse_head(head: Any) -> str | None:
    x, e, table = numbers(2, 3, 4), numbers(2, 3, 4, seed=1), numbers(1, 2, 4, seed=2)
    parts = dict(norm=torch.sin, head=torch.square, modulation=table)
    for rows in (e, e[:, 0]):
        shift, scale = (table + rows.unsqueeze(-2)).view(2, -1, 2, 4).unbind(2)
        if follows(head, parts, (x, rows), (x.sin() * (1 + scale) + shift).square()):
            break
    else:
        return "its forward computes something else than norm, modulation, projection"
    if not isinstance(head.norm, nn.LayerNorm) or head.norm.elementwise_affine:
        return "its norm is not a plain LayerNorm"
    return unknown(head, "norm", "head", "modulation")


register(
    Kind(
        name="head (Wan-Video)",
        ops=("norm_modulate",),
        match=lambda m: has(m, "norm", "head", "modulation") and parameters(m) == ["x", "e"],
        refuse=refuse_head,
        patches=lambda m: [
            (m, "forward", head_forward if "autocast" in reads(type(m).forward) else plain_head_forward)
        ],
        absorbs=lambda head: [head.norm],
        # passes over (tokens, C), in fp32: norm 2, scale 2, shift 2 against 2
        saving=lambda head: 4 * head.modulation.shape[-1] * 4,
        precision="fp32",
    )
)

for function in (block_forward, self_attention_forward, cross_attention_forward, head_forward, plain_head_forward):
    function.__name__ = "forward"
