"""activation: a sample per code path, and the MLPs of the models."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import Maker, Sample, Workload


def _plain(act: str, C: int = 40):
    return lambda m: ((3 * m.randn(2, m.n, C), act), {})


def _gated(m: Maker):
    x, up = m.randn(2, m.n, 2 * 37).chunk(2, dim=-1)  # rows 74 apart
    return (x, "silu"), dict(up=up)


def _gated_contiguous(m: Maker):
    return (m.randn(m.n, 64), "gelu"), dict(up=m.randn(m.n, 64))


def _uneven(m: Maker):
    return (m.randn(3, m.n + 1, 24)[:, 1:], "gelu_tanh"), {}  # leading dims that are no single stride


SAMPLES = (
    *(Sample("activation", act, _plain(act)) for act in ("gelu_tanh", "gelu", "silu", "relu")),
    Sample("activation", "tail", _plain("gelu_tanh", 37)),
    Sample("activation", "one-channel", _plain("gelu", 1)),
    Sample("activation", "gated-halves", _gated),
    Sample("activation", "gated", _gated_contiguous),
    Sample("activation", "uneven-rows", _uneven),
)


# ---- the models' shapes -------------------------------------------------------------------------------
def _eager(x, act, *, up=None):
    y = F.silu(x) if act == "silu" else F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")
    return y if up is None else y * up


def _workload(model: str, rows: tuple[int, ...], C: int, act: str = "gelu_tanh", gated: bool = False) -> Workload:
    def make(m: Maker):
        if not gated:
            return (m.randn(*rows, C), act), {}
        x, up = m.randn(*rows, 2 * C).chunk(2, dim=-1)
        return (x, act), dict(up=up)

    elements = torch.Size((*rows, C)).numel()
    passes, passes_bwd = (3, 5) if gated else (2, 3)
    return Workload(
        "activation", model, "x".join(map(str, (*rows, C))), make, lambda dtype: passes * elements * dtype.itemsize,
        peers={"eager": _eager}, bytes_bwd=lambda dtype: passes_bwd * elements * dtype.itemsize,
    )  # fmt: skip


BENCH = (
    _workload("DiT-XL/2-256", (2, 256), 4608),
    _workload("DiT-XL/2-512", (2, 1024), 4608),
    _workload("Flux2-1024/4", (1, 1152), 18432, "silu", gated=True),
    _workload("Wan2.1-1.3B-480p/8", (1, 4095), 8960),
)
