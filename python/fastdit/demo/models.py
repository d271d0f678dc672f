"""The two models of the demo: diffusers' own classes at their published sizes, with seeded random weights.

Nothing is downloaded. Every weight is random and none is zero: adaLN-Zero as initialised for training would switch
every block off, and then no error could show.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.testing.models import quiet

os.environ.setdefault("HF_HUB_OFFLINE", "1")

DIT_XL_2_256 = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "patch_size": 2,
    "sample_size": 32,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
}


@dataclass(frozen=True)
class Plan:
    """What is run, and how often, on one kind of machine."""

    device: str
    clip: Mapping[str, Any]
    dit: Mapping[str, Any]
    dit_batch: int
    dit_rounds: int
    vae: Mapping[str, Any]
    video: tuple[int, int, int]  # frames, height, width given to the VAE
    probe: tuple[int, int, int]  # latent frames, height, width of the fp64 comparison
    vae_dtypes: tuple[torch.dtype, ...]
    vae_rounds: int


def plan(*, small: bool, device: str) -> Plan:
    clip = {"frames": 49, "size": 256, "fps": 24}
    if small:
        dit = {**DIT_XL_2_256, "num_layers": 2, "num_attention_heads": 4, "sample_size": 16}
        vae = {"base_dim": 24, "z_dim": 16}
        return Plan(device, clip, dit, 2, 3, vae, (5, 64, 64), (2, 4, 4), (torch.float32, torch.bfloat16), 3)
    if device == "cuda":
        dit = {**DIT_XL_2_256, "sample_size": 64}
        return Plan(device, clip, dit, 8, 20, {}, (17, 480, 832), (2, 16, 16), (torch.bfloat16, torch.float32), 5)
    return Plan(device, clip, DIT_XL_2_256, 2, 7, {}, (9, 128, 128), (2, 6, 6), (torch.float32, torch.bfloat16), 5)


def dit(config: Mapping[str, Any]) -> Any:
    from diffusers import DiTTransformer2DModel

    return quiet(_seeded(lambda: DiTTransformer2DModel(**config), seed=1))


def vae(config: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKLWan

    model = quiet(_seeded(lambda: AutoencoderKLWan(**config), seed=2))
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(0.4)  # keeps the pictures inside the clamp to [-1, 1]
    return model


def _seeded(build: Callable[[], Any], seed: int) -> Any:
    """The module in fp32, its weights uniform with variance 1 / fan_in, gains around 1, biases small."""
    from diffusers.models.modeling_utils import no_init_weights

    with no_init_weights():
        model = build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "gamma":
                weight.uniform_(0.8, 1.2, generator=generator)
            elif weight.ndim < 2:
                weight.uniform_(-0.1, 0.1, generator=generator)
            else:
                limit = 1.0 if "embedding" in leaf or "embedding_table" in name else math.sqrt(3 / weight[0].numel())
                weight.uniform_(-limit, limit, generator=generator)
    return model.requires_grad_(False).eval()


def dit_inputs(config: Mapping[str, Any], batch: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = config["sample_size"]
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], size, size, generator=generator).to(device),
        "timestep": torch.linspace(120, 880, batch).long().to(device),
        "class_labels": torch.randint(0, 1000, (batch,), generator=generator).to(device),
    }


def run_dit(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    return model(**{**inputs, "hidden_states": inputs["hidden_states"].to(dtype)}, return_dict=False)[0]
