"""Blocks with an RMSNorm before and after each sublayer, a scale and a tanh gate: Z-Image, Lumina 2, Lumina-Next.

    x = x + tanh(gate_1) * n_2(attention(n_1(x) * (1 + scale_1)))
    x = x + tanh(gate_2) * n_4(ff(n_3(x) * (1 + scale_2)))

Without modulation the scales are 0 and the gates' tanh 1. Bria FIBO 2 has a third sublayer between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.joint import affine, is_diffusers_rms
from fastdit.integrations.structure import has, itemsize, law

Sublayer = Callable[[Tensor], Tensor]


class Between(NamedTuple):
    """x = x + tanh(gate) * after(sublayer(before(x))) between attention and feed-forward; gate (1,)."""

    before: Any
    sublayer: Sublayer
    after: Any
    gate: Tensor


def sandwich_block(
    self: Any,
    x: Tensor,
    norms: Sequence[Any],
    attend: Sublayer,
    ff: Sublayer,
    tables: Tensor | None = None,
    rows: Tensor | None = None,
    between: Between | None = None,
) -> Tensor:
    """The four norms in the order of the formula; tables (R, 4 C): scale_1, gate_1, scale_2, gate_2 of each row.

    rows (B, N): the row of each token; None: rows are samples.
    """
    before1, after1, before2, after2 = norms
    scale1, gate1, scale2, gate2 = (None,) * 4 if tables is None else tables.chunk(4, dim=1)
    given = (before1.weight if tables is None else tables, None if between is None else between.gate)
    h = ops.norm_modulate(x, scale=scale1, row_index=rows, **affine(before1, law(self, x, *given)))
    y = attend(h)
    precision = law(self, x, y, *given)
    opened: dict[str, Any] = dict(scale=scale2, row_index=rows, **affine(before2, precision))
    closed = closing(after1, gate1)
    if between is not None:
        x, h = ops.gate_residual_norm_modulate(
            x, y, **closed, gate_row_index=None if gate1 is None else rows, **affine(between.before, precision)
        )
        gate = between.gate.repeat(x.shape[-1]).expand(x.shape[0] if tables is None else tables.shape[0], -1)
        y, closed = between.sublayer(h), closing(between.after, gate)
    x, h = ops.gate_residual_norm_modulate(x, y, **closed, **opened)
    return ops.gate_residual(x, ff(h), **closing(after2, gate2), row_index=rows, precision=precision)


def closing(after: Any, gate: Tensor | None) -> dict[str, Any]:
    """What the gated operators take for the end of a sublayer: the norm behind it and its gate."""
    act = None if gate is None else "tanh"
    return dict(gate=gate, gate_act=act, post_norm="rms", post_norm_weight=after.weight, post_norm_eps=after.eps)


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


def prenorm_saving(block: Any, width: int) -> int:
    """Of a block with a norm before each sublayer and plain sums, the last of which stays the model's."""
    # passes over (tokens, C): eager two norms (17 with casts to fp32, or 7) and a sum 3; fused 2 + 4
    return (2 * (17 if itemsize(block) == 2 else 7) + 3 - 6) * width * itemsize(block)


def saving(block: Any, width: int, modulated: bool) -> int:
    # passes over (tokens, C): eager four norms (17 with casts to fp32, or 7), 2*(scale 2), 2*(gate 2, add 3) or two
    # additions 3; fused 2 + 4 + 3
    size = itemsize(block)
    return (4 * (17 if size == 2 else 7) + (14 if modulated else 6) - 9) * width * size
