"""diffusers' JoyImageEditTransformer3DModel, with text that rotates too, and its Plus: images of several sizes."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import block_row
from fastdit.testing.zoo import Model, randn

SMALL = dict(in_channels=3, hidden_size=72, num_attention_heads=3, text_dim=20, mlp_width_ratio=3.0, num_layers=2,
             rope_dim_list=[4, 8, 12])  # fmt: skip


def joy(**config) -> Any:
    from diffusers import JoyImageEditTransformer3DModel

    return randomize(JoyImageEditTransformer3DModel(**{**SMALL, **config}))


def plus(**config) -> Any:
    from diffusers import JoyImageEditPlusTransformer3DModel

    return randomize(JoyImageEditPlusTransformer3DModel(**{**SMALL, **config}))


def inputs(items: int = 2) -> dict[str, Any]:
    """Images of one size, (B, items, C, T, H, W): the last is the one to make."""
    given = dict(timestep=torch.tensor([0.03, 0.98]), encoder_hidden_states=randn(2, 7, 20, seed=2))
    return dict(hidden_states=randn(2, items, 3, 1, 6, 10), **given)


def plus_inputs(mask: torch.Tensor | None) -> dict[str, Any]:
    """Patches of two images, or with a mask of one in the first sample, padded."""
    shapes = [[(1, 3, 3)], [(1, 3, 3), (1, 2, 4)]] if mask is not None else [[(1, 3, 3), (1, 2, 4)]] * 2
    patches = randn(2, 17, 3, 1, 2, 2)
    return {**inputs(), "hidden_states": patches, "encoder_hidden_states_mask": mask, "shape_list": shapes}


PADDED = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1, 1]])


def layers(processor: str) -> dict[str, int]:
    return {
        "JoyImage block": 2,
        f"attention ({processor})": 2,
        "feed-forward activation": 4,
        "patch embedding (Conv3d, kernel = stride)": 1,
    }


EDIT, PLUS = "JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"
EDIT_LAYERS, PLUS_LAYERS = layers("JoyImageAttnProcessor"), layers("JoyImageEditPlusAttnProcessor")
MODELS = (
    Model(EDIT, "joyimage", joy, inputs, EDIT_LAYERS),
    Model(f"{EDIT}, text rotated", "joyimage", lambda: joy(rope_type="mrope"), inputs, EDIT_LAYERS),
    Model(PLUS, "joyimage", plus, lambda: plus_inputs(PADDED), PLUS_LAYERS),
    Model(f"{PLUS}, no mask", "joyimage", plus, lambda: plus_inputs(None), PLUS_LAYERS),
)


# ---- at full width ------------------------------------------------------------------------------------------


def block_inputs(dtype: torch.dtype, side: int = 40, text: int = 256) -> tuple:
    streams = (randn(1, n, 3072, seed=n).to(dtype) for n in (side * side, text))
    rope = joy(num_layers=0, hidden_size=128, num_attention_heads=1, rope_dim_list=[16, 56, 56]).get_rotary_pos_embed
    return *streams, randn(1, 6, 3072).to(dtype), rope([1, side, side])


ROWS = (
    block_row(
        "JoyImage-Edit block", "1x1600x3072, 256 text tokens",
        lambda: joy(num_layers=1, hidden_size=3072, num_attention_heads=24, mlp_width_ratio=4.0,
                    rope_dim_list=[16, 56, 56]),
        "double_blocks.0", block_inputs,
    ),
)  # fmt: skip
