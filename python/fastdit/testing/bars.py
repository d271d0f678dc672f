"""The performance bars: what each op must reach against its peers, in the run at hand.

`copy` and `gemm` are the machine's ceilings in the same run: a copy of the bytes that the op must move, torch's GEMM at
its FLOPs. The figures are those of AVX-512 BF16 on two cores; on another machine they say where it differs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .bench import Measured


@dataclass(frozen=True)
class Bar:
    """Every matching row must be at least so many times as fast as the peer.

    models: parts of the names of the rows that it holds for; none means all, a leading "!" excludes.
    dense: the row of dense attention whose share of GEMM is the measure instead of GEMM itself.
    """

    op: str
    peer: str
    at_least: float
    dtype: str | None = None
    pass_: str = "fwd"
    models: tuple[str, ...] = ()
    dense: str | None = None

    @property
    def against(self) -> str:
        return f"dense {self.dense}" if self.dense else self.peer

    def holds_for(self, m: Measured) -> bool:
        name = m.workload.model
        excluded = [part[1:] for part in self.models if part.startswith("!")]
        included = [part for part in self.models if not part.startswith("!")]
        return (
            (m.workload.op, m.pass_) == (self.op, self.pass_)
            and self.dtype in (None, str(m.dtype).removeprefix("torch."))
            and self.peer in m.peers
            and not any(part in name for part in excluded)
            and (not included or any(part in name for part in included))
        )


@dataclass(frozen=True)
class Verdict:
    bar: Bar
    ratios: tuple[tuple[str, float], ...]  # (model dtype, ratio)

    @property
    def under(self) -> list[tuple[str, float]]:
        return [(name, ratio) for name, ratio in self.ratios if ratio < self.bar.at_least]

    @property
    def met(self) -> bool:
        return not self.under

    @property
    def lowest(self) -> float:
        return min(ratio for _, ratio in self.ratios)

    @property
    def median(self) -> float:
        return statistics.median(ratio for _, ratio in self.ratios)


_BF16, _FP32 = "bfloat16", "float32"
_WAN = "Wan2.1-1.3B-480p/8"

BARS = (
    Bar("norm_modulate", "copy", 0.80),
    Bar("norm_modulate", "eager", 2.5),
    Bar("norm_modulate", "compile", 2.0, _BF16),
    Bar("norm_modulate", "compile", 1.25, _FP32),
    Bar("gate_residual_norm_modulate", "copy", 0.80),
    Bar("gate_residual_norm_modulate", "eager", 2.5),
    Bar("gate_residual_norm_modulate", "compile", 1.5),
    Bar("qk_norm_rope", "copy", 0.60),
    Bar("qk_norm_rope", "eager", 10.0),
    Bar("qk_norm_rope", "compile", 4.0),
    Bar("norm_modulate", "copy", 0.60, pass_="bwd"),
    Bar("norm_modulate", "eager", 3.0, pass_="bwd"),
    Bar("gate_residual_norm_modulate", "copy", 0.60, pass_="bwd"),
    Bar("gate_residual_norm_modulate", "eager", 3.0, pass_="bwd"),
    Bar("qk_norm_rope", "copy", 0.60, pass_="bwd"),
    Bar("qk_norm_rope", "eager", 3.0, pass_="bwd"),
    Bar("attention", "sdpa", 2.3, _BF16, models=("DiT-XL/2-512", "SD3.5")),
    Bar("attention", "gemm", 0.90, _BF16, models=("DiT-XL/2-512", "SD3.5")),
    Bar("attention", "sdpa", 2.2, _BF16, models=(_WAN,)),
    Bar("attention", "gemm", 0.95, _BF16, models=(_WAN,)),
    Bar("attention", "sdpa", 1.10, _FP32),
    Bar("attention", "gemm", 0.95, _FP32),
    Bar("attention", "sdpa", 1.5, _BF16, pass_="bwd"),
    Bar("attention_varlen", "padded", 2.5, _BF16, models=("ragged",)),
    Bar("attention_varlen", "gemm", 0.95, _BF16, models=("ragged",), dense="DiT-XL/2-512"),
    Bar("attention", "gemm", 0.90, _BF16, models=("frame-causal",), dense=_WAN),
    Bar("attention_varlen", "gemm", 0.90, _BF16, models=("tiles",), dense=_WAN),
    Bar("attention_varlen", "gemm", 0.90, _BF16, models=("window",), dense="SD3.5-L-1024"),
    Bar("causal_conv3d", "eager", 1.0, _BF16, models=("!winograd",)),
    Bar("causal_conv3d", "conv_ndhwc", 1.0, _BF16, models=("!winograd",)),
    Bar("causal_conv3d", "conv_ndhwc", 2.5, models=("C384-first",)),  # one frame, no cache
    Bar("causal_conv3d", "conv_ndhwc", 1.3, models=("first4",)),
    Bar("causal_conv3d", "conv_ndhwc", 1.3, models=("C96-480p",)),
    Bar("causal_conv3d", "eager", 1.4, _FP32, models=("!direct", "!winograd", "!down")),  # what auto takes
    Bar("causal_conv3d", "conv_ndhwc", 1.4, _FP32, models=("!direct", "!winograd", "!down")),
    Bar("causal_conv3d", "eager", 1.0, _FP32, models=("direct", "down")),
    Bar("causal_conv3d", "conv_ndhwc", 1.0, _FP32, models=("direct", "down")),
    Bar("causal_conv3d", "conv_ndhwc", 1.4, _BF16, models=("winograd2d",)),
    Bar("patch_embed3d", "eager", 2.0),
    Bar("patch_embed3d", "linear_rewrite", 1.3),
    Bar("model", "eager", 1.08, models=("DiT-XL/2-256",)),
    Bar("model", "eager", 1.15, models=("DiT-XL/2-512",)),
    Bar("model", "compile", 1.0, models=("DiT-XL/2",)),
    Bar("model", "eager", 2.0, _FP32, models=("AutoencoderKLWan",)),
    Bar("model", "eager", 1.2, _BF16, models=("AutoencoderKLWan", "!winograd2d")),
    Bar("model", "eager", 1.5, _BF16, models=("winograd2d",)),
    Bar("model", "eager", 1.5, models=("Wan2.1-1.3B block",)),
    Bar("model", "eager", 1.1, pass_="fwd+bwd", models=("training",)),
)


def judge(measured: Sequence[Measured], bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """The bars that some row of this run falls under."""
    found = []
    for bar in bars:
        unit = 1.0 if bar.dense is None else _dense_rate(measured, bar)
        rows = [m for m in measured if bar.holds_for(m)]
        if rows and unit:
            names = (f"{m.workload.model} {str(m.dtype).removeprefix('torch.')}" for m in rows)
            found.append(Verdict(bar, tuple(zip(names, (m.ratio(bar.peer) / unit for m in rows), strict=True))))
    return found


def _dense_rate(measured: Sequence[Measured], bar: Bar) -> float | None:
    dense = Bar("attention", bar.peer, 0.0, bar.dtype, bar.pass_, (bar.dense or "",))
    return next((m.ratio(bar.peer) for m in measured if dense.holds_for(m)), None)
