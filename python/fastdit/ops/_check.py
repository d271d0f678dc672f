"""What several families check. Every message reads: `op: what is wrong; got X, expected Y; what to do.`"""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")
FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
INDEX = (torch.int32, torch.int64)
PRECISIONS = ("fp32", "native")


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def floating(op: str, what: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {what} must be a tensor; got {type(t).__name__}, expected Tensor; convert it first.")
    if t.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {what} has a dtype without a kernel; got {name(t.dtype)}, "
            "expected float32, bfloat16, float16 or float64; cast it."
        )


def rank(op: str, what: str, t: Tensor, ranks: tuple[int, ...], layout: str) -> None:
    if t.dim() not in ranks:
        raise ValueError(f"{op}: {what} has the wrong rank; got {list(t.shape)}, expected {layout}; reshape it.")


def channels_contiguous(op: str, what: str, t: Tensor) -> None:
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(
            f"{op}: the last dim of {what} must be contiguous; got strides {tuple(t.stride())}, "
            "expected stride 1 there; call .contiguous() on it."
        )


def same_device(op: str, what: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{op}: {what} is on another device; got {t.device}, expected {x.device}; move it there.")


def choice(op: str, what: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {what} is unknown; got {value!r}, expected one of {allowed}; choose one of them.")


def epsilon(op: str, what: str, eps: float) -> None:
    if not 0.0 <= eps < INF:  # also catches NaN
        raise ValueError(f"{op}: {what} must be finite and not negative; got {eps}, expected e.g. 1e-6; set it.")


def native_dtype(op: str, what: str, t: Tensor, x: Tensor) -> None:
    if t.dtype != x.dtype:
        raise TypeError(
            f"{op}: precision='native' needs one dtype; got {what} in {name(t.dtype)} beside {name(x.dtype)}, "
            f"expected {name(x.dtype)}; cast it or use precision='fp32'."
        )


def index_range(op: str, what: str, index: Tensor, size: int) -> None:
    """Looks into the tensor: call it from an op's `validate` only."""
    if index.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(index))
    if low < 0 or high >= size:
        raise ValueError(
            f"{op}: {what} is out of range; got values {low}..{high}, expected 0..{size - 1}; "
            "every value names a row of the tables."
        )
