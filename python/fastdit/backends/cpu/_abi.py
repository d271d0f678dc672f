"""What every adapter needs to speak to fastdit._cpu."""

from __future__ import annotations

import torch

# Mirrors fastdit::DType in csrc/include/fastdit/dtype.h.
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def on_cpu(x: torch.Tensor) -> str | None:
    """The refusal that all CPU kernels share: None when x is theirs."""
    if not x.is_cpu:
        return f"needs a CPU tensor; got {x.device}"
    if x.dtype not in DTYPE:
        return f"has no kernel for {x.dtype}"
    return None


def pointer(t: torch.Tensor | None) -> int:
    """The address of a tensor's first element; 0 stands for None."""
    return 0 if t is None else t.data_ptr()
