"""accelerate on diffusers' Qwen-Image: text masks as key lengths, rows by index, compilation, what stays."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import check_one_graph, layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import cast_tree, qwen, randn

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@each_dtype
@torch.no_grad()
def test_head_width(dtype):
    """Heads of 128 and the axes of the released models, edit, half of the text padding."""
    model = qwen.qwen(num_layers=1, attention_head_dim=128, axes_dims_rope=(16, 56, 56), zero_cond_t=True).to(dtype)
    given = qwen.inputs((1, 3, 5), (1, 2, 4), mask=qwen.PADDED)

    def run(model, dtype):
        return model(**{k: v if k == "timestep" else cast_tree(v, dtype) for k, v in given.items()}).sample

    with no_rounding():
        truth = run(exact(model), torch.float64)
    before = run(model, dtype)
    fastdit.accelerate(model)
    close.assert_close(run(model, dtype), truth, before)


@torch.no_grad()
def test_compiled_block():
    """One graph for all lengths, with a mask and rows by index."""
    model = qwen.qwen(**qwen.EDIT)
    fastdit.accelerate(model)

    def call(image, text):
        x, context, temb = randn(2, image, 72), randn(2, text, 72, seed=2), randn(4, 72, seed=3)
        mask = torch.arange(text) < torch.tensor([[3], [text]])
        rope = [torch.polar(torch.ones(n, 12), randn(n, 12)) for n in (image, text)]
        index = (torch.arange(image) > 8).int().expand(2, image)
        return x, context, mask, temb, rope, None, index

    check_one_graph(model.transformer_blocks[0], (call(*lengths) for lengths in ((15, 7), (12, 9), (20, 5))))


@torch.no_grad()
def test_controlnet():
    from diffusers import QwenImageControlNetModel

    small = dict(in_channels=12, out_channels=3, num_layers=2, attention_head_dim=24, num_attention_heads=3,
                 joint_attention_dim=32, axes_dims_rope=(4, 8, 12))  # fmt: skip
    model = qwen.randomize(QwenImageControlNetModel(**small))
    report = fastdit.accelerate(model)
    assert layers(report) == {k: n for k, n in qwen.LAYERS.items() if "output" not in k}


def test_what_stays():
    model = qwen.qwen(num_layers=4)
    blocks = model.transformer_blocks
    blocks[0].img_norm2 = nn.RMSNorm(72)
    blocks[1].img_mod = nn.Sequential(nn.GELU(), nn.Linear(72, 6 * 72))
    blocks[2].attn.processor = copy.copy(blocks[2].attn.processor)
    blocks[2].attn.processor._attention_backend = "native"
    blocks[3].attn.norm_added_k = None
    report = fastdit.accelerate(model)
    assert layers(report) == {
        "Qwen-Image block": 2,
        "feed-forward activation": 4,
        "output norm (AdaLayerNormContinuous)": 1,
    }
    assert reasons(report) >= {
        "its norm is a RMSNorm, not a LayerNorm without parameters",
        "its modulation is a Sequential, not SiLU and a linear layer",
        "another attention backend was chosen for it",
        "its query and key norm is a NoneType, not an RMSNorm or a LayerNorm with an eps",
    }


def test_foreign_masks_raise_as_before():
    model = qwen.qwen()
    fastdit.accelerate(model)
    with pytest.raises(ValueError, match="does not accept an external attention_mask"):
        model(**qwen.inputs(), attention_kwargs={"attention_mask": torch.ones(2, 22)})
