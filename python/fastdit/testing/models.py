"""Small and full-size models of the codebases that `accelerate` knows, with weights that make every layer matter.

diffusers is imported on use: it is an extra.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

WAN21 = dict(
    base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
)
WAN22 = dict(
    base_dim=8, decoder_base_dim=12, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, is_residual=True, patch_size=2,
    in_channels=12, out_channels=12, scale_factor_spatial=16, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
)  # fmt: skip


def randomize(model: Any, seed: int = 0) -> Any:
    """Weights of scale 1/sqrt(fan-in), norms around one, biases and tables small: no gate is zero, nothing explodes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue  # fixed positions
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            if fan_in == 1:  # a norm's weight, or a bias
                noise = 0.1 * noise + (1.0 if name.endswith("gamma") else 0.0)
            else:
                noise = noise / math.sqrt(fan_in)
            parameter.copy_(noise)
    return model.eval()


def twin(model: Any) -> Any:
    """A second module over the same parameters and buffers: one stays as it is, the other is accelerated."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """In place what `from_pretrained(torch_dtype=dtype)` gives: modules that the class keeps in fp32 stay so."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            narrow = dtype.itemsize < 4 and not kept.intersection(name.split("."))
            tensor.data = tensor.data.to(dtype if narrow or dtype.itemsize > 4 else torch.float32)
    return model


def quiet(model: Any) -> Any:
    """The model; diffusers will not warn at each `.to(dtype)`, whether or not it has modules to keep in fp32."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    return model


def diffusers_dit(*, layers: int = 2, heads: int = 2, head_dim: int = 32, size: int = 16, seed: int = 0) -> Any:
    """DiTTransformer2DModel; layers=28, heads=16, head_dim=72, size=32 is DiT-XL/2 at 256 x 256."""
    from diffusers import DiTTransformer2DModel

    return randomize(
        DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, sample_size=size, out_channels=8
        ),
        seed,
    )


def diffusers_wan_vae(seed: int = 0, **config) -> Any:
    """AutoencoderKLWan; without config the full-size Wan 2.1 VAE."""
    from diffusers import AutoencoderKLWan

    return randomize(AutoencoderKLWan(**config), seed)


def diffusers_wan(seed: int = 0, **config) -> Any:
    """WanTransformer3DModel of two narrow layers; `image_dim` and `added_kv_proj_dim` make it image-to-video."""
    from diffusers import WanTransformer3DModel

    small = dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=32,
                 freq_dim=16, ffn_dim=96, num_layers=2, rope_max_seq_len=32)  # fmt: skip
    return randomize(WanTransformer3DModel(**{**small, **config}), seed)
