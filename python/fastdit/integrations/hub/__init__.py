"""fastdit's layers for Hugging Face's `kernels`: a kernel repository on this disk, and the mapping to it.

    from kernels import Mode, kernelize, register_kernel_mapping
    from fastdit.integrations import hub

    register_kernel_mapping(hub.mapping())
    hub.mark_diffusers()
    kernelize(model, mode=Mode.INFERENCE | Mode.TORCH_COMPILE)

Layers are replaced one by one, each by its own op; `fastdit.accelerate` replaces whole blocks and fuses across layers.
Nothing here imports kernels or diffusers before a function needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdit.integrations.hub import layers

REPOSITORY = Path(__file__).parent  # what `LocalLayerRepository(repo_path=...)` takes
LAYERS = ("AdaLayerNormContinuous", "AdaLayerNormZero", "AdaLayerNormZeroSingle", "FP32LayerNorm", "GEGLU", "GELU",
          "RMSNorm", "SwiGLU")  # fmt: skip


def mapping(devices: tuple[str, ...] = ("cpu", "cuda")) -> dict[str, dict[str, Any]]:
    """What `kernels.register_kernel_mapping` and `use_kernel_mapping` take: every layer, for each kind of device.

    Raises:
        ImportError: kernels is not installed.
    """
    from kernels import LocalLayerRepository

    return {name: {device: LocalLayerRepository(REPOSITORY, layer_name=name) for device in devices} for name in LAYERS}


def mark_diffusers() -> None:
    """Let `kernelize` see diffusers' layers: its classes do not say which kernel they stand for.

    Raises:
        ImportError: kernels or diffusers is not installed.
    """
    from diffusers.models import activations, normalization
    from kernels import replace_kernel_forward_from_hub

    for name in LAYERS:
        replace_kernel_forward_from_hub(getattr(normalization, name, None) or getattr(activations, name), name)


__all__ = ["LAYERS", "REPOSITORY", "layers", "mapping", "mark_diffusers"]
