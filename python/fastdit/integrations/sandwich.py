"""Blocks with an RMSNorm before and after each sublayer, a scale and a tanh gate: Z-Image, Lumina 2, Lumina-Next.

    x = x + tanh(gate_1) * n_2(attention(n_1(x) * (1 + scale_1)))
    x = x + tanh(gate_2) * n_4(ff(n_3(x) * (1 + scale_2)))

Without modulation the scales are 0 and the gates' tanh 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.joint import is_diffusers_rms
from fastdit.integrations.structure import has, itemsize, law

Sublayer = Callable[[Tensor], Tensor]


def sandwich_block(
    self: Any,
    x: Tensor,
    norms: Sequence[Any],
    attend: Sublayer,
    ff: Sublayer,
    tables: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The four norms in the order of the formula; tables (R, 4 C): scale_1, gate_1, scale_2, gate_2 of each row.

    rows (B, N): the row of each token; None: rows are samples.
    """
    before1, after1, before2, after2 = norms
    scale1, gate1, scale2, gate2 = (None,) * 4 if tables is None else tables.chunk(4, dim=1)
    common: dict[str, Any] = dict(row_index=rows, precision=law(self, x, before1.weight if tables is None else tables))
    act = None if tables is None else "tanh"
    h = ops.norm_modulate(x, scale=scale1, weight=before1.weight, norm="rms", eps=before1.eps, **common)
    x, h = ops.gate_residual_norm_modulate(
        x,
        attend(h),
        gate1,
        gate_act=act,
        post_norm="rms",
        post_norm_weight=after1.weight,
        post_norm_eps=after1.eps,
        scale=scale2,
        weight=before2.weight,
        norm="rms",
        eps=before2.eps,
        **common,
    )
    return ops.gate_residual(
        x,
        ff(h),
        gate2,
        gate_act=act,
        post_norm="rms",
        post_norm_weight=after2.weight,
        post_norm_eps=after2.eps,
        **common,
    )


def refuse_norms(*norms: Any) -> str | None:
    for norm in norms:
        if not is_diffusers_rms(norm) or norm.weight is None:
            return f"its norm is a {type(norm).__name__}, not an RMSNorm with a weight"
    return None


def refuse_modulation(zero: Any) -> str | None:
    """For diffusers' LuminaRMSNormZero: SiLU and a linear layer to the four tables beside the first norm."""
    if not has(zero, "norm", "linear") or type(getattr(zero, "silu", None)) is not nn.SiLU:
        return f"its modulation is a {type(zero).__name__}, not SiLU, linear layer and norm"
    return None


def saving(block: Any, width: int, modulated: bool) -> int:
    # passes over (tokens, C): eager four norms (17 with casts to fp32, or 7), 2*(scale 2), 2*(gate 2, add 3) or two
    # additions 3; fused 2 + 4 + 3
    size = itemsize(block)
    return (4 * (17 if size == 2 else 7) + (14 if modulated else 6) - 9) * width * size
