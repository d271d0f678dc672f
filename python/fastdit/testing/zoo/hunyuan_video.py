"""diffusers' HunyuanVideo, its token-replace and Framepack variants, HunyuanVideo-1.5 and HunyuanImage."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole
from fastdit.testing.zoo import Model, randn

PAGE = "hunyuan_video"
TEXT, GRID = 7, (3, 3, 5)  # tokens
WIDE = dict(num_attention_heads=3, attention_head_dim=16, num_refiner_layers=1, mlp_ratio=3.0, rope_axes_dim=(4, 4, 8))
SMALL = dict(**WIDE, num_layers=2, num_single_layers=2, text_embed_dim=28, pooled_projection_dim=20)
LAYERS = {
    "HunyuanVideo dual block": 2,
    "HunyuanVideo single block": 2,
    "HunyuanVideo text refiner block": 1,
    "attention (HunyuanVideoAttnProcessor2_0)": 4,
    "attention (AttnProcessor2_0)": 1,
    "feed-forward activation": 4,
    "patch embedding (Conv3d, kernel = stride)": 1,
    "output norm (AdaLayerNormContinuous)": 1,
}
LAYERS15 = {
    "HunyuanVideo-1.5 text order and output layout": 1,
    "HunyuanVideo dual block": 2,
    "HunyuanVideo text refiner block": 1,
    "attention (HunyuanVideo15AttnProcessor2_0)": 2,
    "attention (AttnProcessor2_0)": 1,
    "feed-forward activation": 4,
    "patch embedding (Conv3d, kernel = stride)": 1,
    "output norm (AdaLayerNormContinuous)": 1,
}
IMAGE = {
    **{layer: n for layer, n in LAYERS.items() if "VideoAttn" not in layer and "Conv3d" not in layer},
    "attention (HunyuanImageAttnProcessor)": 4,
    "patch embedding (Conv2d, kernel = stride)": 1,
}


def hunyuan(seed: int = 0, **config) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return randomize(HunyuanVideoTransformer3DModel(**{**SMALL, "in_channels": 4, "out_channels": 4, **config}), seed)


def framepack(seed: int = 0) -> nn.Module:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    config = dict(in_channels=4, out_channels=4, has_image_proj=True, image_proj_dim=12, has_clean_x_embedder=True)
    return randomize(HunyuanVideoFramepackTransformer3DModel(**SMALL, **config), seed)


def hunyuan15(seed: int = 0, **config) -> nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    small = dict(**WIDE, num_layers=2, in_channels=9, out_channels=4, text_embed_dim=28, text_embed_2_dim=18,
                 image_embed_dim=12)  # fmt: skip
    return randomize(HunyuanVideo15Transformer3DModel(**{**small, **config}), seed)


def hunyuan_image(seed: int = 0, **config) -> nn.Module:
    from diffusers import HunyuanImageTransformer2DModel

    small = {**SMALL, "in_channels": 4, "out_channels": 4, "rope_axes_dim": (8, 8), **config}
    del small["pooled_projection_dim"]
    model = randomize(HunyuanImageTransformer2DModel(**small), seed)
    model._supports_gradient_checkpointing = False  # diffusers 0.42.1 passes its blocks keywords that it does not take
    return model


def mask(*lengths: int, of: int = TEXT) -> Tensor:
    return (torch.arange(of) < torch.tensor(lengths)[:, None]).long()


def inputs(*, guidance: bool = True) -> dict[str, Any]:
    given = dict(
        hidden_states=randn(2, 4, 3, 6, 10),
        timestep=torch.tensor([3, 987]),
        encoder_hidden_states=randn(2, TEXT, 28, seed=2),
        encoder_attention_mask=mask(3, 6),
        pooled_projections=randn(2, 20, seed=3),
    )
    return {**given, "guidance": torch.tensor([6000.0, 1000.0])} if guidance else given


def history(batch: int) -> dict[str, Any]:
    """Framepack's: one sample drops its padding, several keep a mask."""
    given = {k: v[:batch] for k, v in inputs().items()}
    return dict(
        **given,
        image_embeds=randn(batch, 2, 12, seed=4),
        indices_latents=torch.tensor([7, 8, 9]),
        latents_clean=randn(batch, 4, 2, 6, 10, seed=5),
        indices_latents_clean=torch.tensor([0, 10]),
        latents_history_2x=randn(batch, 4, 2, 6, 10, seed=6),
        indices_latents_history_2x=torch.tensor([5, 6]),
        latents_history_4x=randn(batch, 4, 4, 6, 10, seed=7),
        indices_latents_history_4x=torch.tensor([1, 2, 3, 4]),
    )


def inputs15(*, image: bool = True, **extra: Any) -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 9, 3, 3, 5),
        timestep=torch.tensor([3.0, 987.0]),
        encoder_hidden_states=randn(2, TEXT, 28, seed=2),
        encoder_attention_mask=torch.tensor([[1, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]),
        encoder_hidden_states_2=randn(2, 5, 18, seed=3),
        encoder_attention_mask_2=mask(0, 4, of=5),
        image_embeds=randn(2, 4, 12, seed=4) if image else torch.zeros(2, 4, 12),
        **extra,
    )


def image_inputs(*, glyphs: bool = False) -> dict[str, Any]:
    second = dict(encoder_hidden_states_2=randn(2, 5, 18, seed=3), encoder_attention_mask_2=mask(0, 4, of=5))
    return dict(
        hidden_states=randn(2, 4, 5, 7),
        timestep=torch.tensor([3.0, 987.0]),
        encoder_hidden_states=randn(2, TEXT, 28, seed=2),
        encoder_attention_mask=torch.tensor([[1, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]),
        **(second if glyphs else {}),
    )


def model(name: str, build: Any, given: Any, layers: dict[str, int]) -> Model:
    return Model(name, PAGE, build, given, layers, keeps=("guidance",), fixed=("timestep", "guidance"))


MODELS = (
    model("HunyuanVideoTransformer3DModel", hunyuan, inputs, LAYERS),
    model(
        "HunyuanVideoTransformer3DModel, no guidance",
        lambda: hunyuan(guidance_embeds=False, image_condition_type="latent_concat"),
        lambda: inputs(guidance=False),
        LAYERS,
    ),
    model(
        "HunyuanVideoTransformer3DModel, token replace",
        lambda: hunyuan(image_condition_type="token_replace"),
        inputs,
        LAYERS,
    ),
    model(
        "HunyuanVideoFramepackTransformer3DModel",
        framepack,
        lambda: history(2),
        {**LAYERS, "patch embedding (Conv3d, kernel = stride)": 2},
    ),
    model(
        "HunyuanVideoFramepackTransformer3DModel, one sample",
        framepack,
        lambda: history(1),
        {**LAYERS, "patch embedding (Conv3d, kernel = stride)": 2},
    ),
    model("HunyuanVideo15Transformer3DModel", hunyuan15, inputs15, LAYERS15),
    model("HunyuanVideo15Transformer3DModel, no image", hunyuan15, lambda: inputs15(image=False), LAYERS15),
    model(
        "HunyuanVideo15Transformer3DModel, two timesteps",
        lambda: hunyuan15(use_meanflow=True),
        lambda: inputs15(timestep_r=torch.tensor([1.0, 900.0])),
        LAYERS15,
    ),
    model("HunyuanImageTransformer2DModel", hunyuan_image, image_inputs, IMAGE),
    model(
        "HunyuanImageTransformer2DModel, glyphs",
        lambda: hunyuan_image(text_embed_2_dim=18),
        lambda: image_inputs(glyphs=True),
        IMAGE,
    ),
)


def block(
    name: str,
    kind: str,
    build: Any,
    *,
    heads: int = 24,
    grid: tuple[int, int, int] = (2, 32, 32),
    text: int = 256,
    valid: int = 60,
    whole_mask: bool = True,
) -> Whole:
    """One block of `kind` (the model's list of them) over one video and `valid` of `text` tokens."""
    width, tokens = 128 * heads, math.prod(grid)
    size = dict(num_attention_heads=heads, attention_head_dim=128, num_refiner_layers=0, mlp_ratio=4.0,
                rope_axes_dim=(16, 56, 56))  # fmt: skip

    def run(dtype: torch.dtype, device: str) -> Run:
        x, context = (randn(1, n, width, seed=n).to(device, dtype) for n in (tokens, text))
        temb, first = (randn(1, width, seed=s).to(device, dtype) for s in (1, 2))
        there = mask(valid, of=text).bool()
        keys = (
            torch.cat([torch.ones(1, tokens, dtype=torch.bool), there], dim=1)[:, None, None] if whole_mask else there
        )

        def call(model: Any) -> Tensor:
            rope = model.rope(
                x.new_empty(1, 1, grid[0], grid[1] * model.rope.patch_size, grid[2] * model.rope.patch_size)
            )
            with torch.no_grad():
                out = getattr(model, kind)[0](x, context, temb, keys.to(device), rope, first, math.prod(grid[1:]))
            return torch.cat([out[0], out[1][:, :valid]], dim=1)  # padded text differs, and reaches nothing

        return call

    return Whole(
        name, f"1x{tokens}x{width}, one block, {valid} of {text} text tokens",
        lambda: build(**size, num_layers=int(kind == "transformer_blocks")), run,
        compile=lambda model: getattr(model, kind)[0].compile(dynamic=False),
    )  # fmt: skip


def dual_only(**config) -> nn.Module:
    return hunyuan(**config, num_single_layers=0)


def single_only(**config) -> nn.Module:
    return hunyuan(**config, num_single_layers=1)


ROWS = (
    block("HunyuanVideo dual block", "transformer_blocks", dual_only),
    block("HunyuanVideo single block", "single_transformer_blocks", single_only),
    block(
        "HunyuanVideo dual block, token replace",
        "transformer_blocks",
        lambda **config: dual_only(**config, image_condition_type="token_replace"),
    ),
    block("HunyuanVideo-1.5 block", "transformer_blocks", hunyuan15, heads=16, text=1985, valid=300, whole_mask=False),
)
