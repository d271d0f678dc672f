"""accelerate and restore on diffusers' WanTransformer3DModel: T2V, I2V, a timestep per token, fused projections."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.models import diffusers_wan
from fastdit.testing.zoo import wan

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def inputs(dtype, **options):
    return {k: v if k == "timestep" or v is None else v.to(dtype) for k, v in wan.inputs(**options).items()}


def run(model, given, dtype=None):
    given = {k: v.to(dtype) if dtype and v is not None and k != "timestep" else v for k, v in given.items()}
    return model(**given, return_dict=False)[0]


def truth_of(model, given):
    with no_rounding():
        return run(exact(model), given, torch.float64)


def layers(report, replaced=True):
    return {row.layer: row.count for row in report.rows if row.replaced is replaced}


@torch.no_grad()
def test_fused_projections():
    for config, options in (({}, {}), (wan.I2V, dict(image=True))):
        model, given = diffusers_wan(**config), inputs(torch.float32, **options)
        truth, before = truth_of(model, given), run(model, given)
        fastdit.accelerate(model)
        for block in model.blocks:
            block.attn1.fuse_projections()
            block.attn2.fuse_projections()
        close.assert_close(run(model, given), truth, before)


@each_dtype
@torch.no_grad()
def test_block_at_full_width(dtype):
    """One Wan2.1-1.3B block: 12 heads of 128, feed-forward 8960."""
    config = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=1)
    model, given = diffusers_wan(**config).to(dtype), inputs(dtype)
    truth, before = truth_of(model, given), run(model, given)
    fastdit.accelerate(model)
    close.assert_close(run(model, given), truth, before)


def test_what_stays():
    model = diffusers_wan()
    model.blocks[0].norm1 = nn.RMSNorm(48)
    model.blocks[1].attn1.processor = copy.copy(model.blocks[1].attn1.processor)
    model.blocks[1].attn1.processor._attention_backend = "native"
    model.patch_embedding = nn.Conv3d(4, 48, (1, 2, 2), stride=(1, 2, 2), padding=(0, 1, 1))
    report = fastdit.accelerate(model)
    assert layers(report) == {"Wan block": 1, "attention (WanAttnProcessor)": 1, "feed-forward activation": 1}
    reasons = {row.why for row in report.rows}
    assert "its norm is a RMSNorm, not a LayerNorm" in reasons
    assert "another attention backend was chosen for it" in reasons
    assert "its convolution is not a plain nn.Conv3d" in reasons


@torch.no_grad()
def test_masks_go_to_the_original():
    model = diffusers_wan()
    attn, h, context = model.blocks[0].attn2, torch.randn(2, 5, 48), torch.randn(2, 7, 48)
    mask = torch.arange(7).ge(4).expand(2, 1, 1, 7)
    before = attn(h, context, mask)
    fastdit.accelerate(model)
    close.assert_bitwise(attn(h, context, mask), before)


@torch.no_grad()
def test_compiled_block():
    model = diffusers_wan()
    fastdit.accelerate(model)
    block = model.blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for grid in ((1, 2, 4), (2, 3, 5)):
        tokens = grid[0] * grid[1] * grid[2]
        rope = model.rope(torch.empty(1, 4, grid[0], 2 * grid[1], 2 * grid[2]))
        h, context, temb = torch.randn(2, tokens, 48), torch.randn(2, 9, 48), torch.randn(2, 6, 48)
        close.assert_bitwise(compiled(h, context, temb, rope), block(h, context, temb, rope))
