"""Compiled kernels that make Diffusion Transformers and causal video VAEs fast, as PyTorch ops.

from fastdit import ops                 functional, differentiable, torch.compile-safe
report = fastdit.accelerate(model)      replaces the layers of an existing DiT or VAE; fastdit.restore(model) undoes it
fastdit.explain("attention", q, k, v)   which backend a call takes, and why not the others
"""

__version__ = "0.1.0"

from .backends import (
    NoBackend,
    cpu as _cpu_backend,
    cuda as _cuda_backend,
    flash_attn as _flash_attn_backend,
    reference as _reference_backend,
    sdpa as _sdpa_backend,
    set_backend,
    triton as _triton_backend,
    use_backend,
)

_reference_backend.register_all()
_cpu_backend.register_all()
_cuda_backend.register_all()
_triton_backend.register_all()
_flash_attn_backend.register_all()
_sdpa_backend.register_all()

from . import ops  # noqa: E402
from .integrations import accelerate, restore  # noqa: E402
from .ops import explain  # noqa: E402

__all__ = ["NoBackend", "accelerate", "explain", "ops", "restore", "set_backend", "use_backend"]
