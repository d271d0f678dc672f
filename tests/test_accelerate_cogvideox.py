"""accelerate on diffusers' CogVideoXTransformer3DModel: fused projections, masks, refusals, a compiled block."""

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import check_autocast, layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import call_model, cogvideox, randn

GRID, ROTARY = cogvideox.GRID, cogvideox.ROTARY


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@torch.no_grad()
def test_fused_projections(early):
    """Fused before accelerate, their processor is known; fused afterwards, diffusers' own takes its place."""
    model, given = cogvideox.cogvideox(**ROTARY), cogvideox.inputs()
    with no_rounding():
        truth = call_model(exact(model), {k: v.double() if k.endswith("states") else v for k, v in given.items()})
    before = call_model(model, given)
    if early:
        model.fuse_qkv_projections()
    report = fastdit.accelerate(model)
    assert layers(report) == cogvideox.PATCHED
    if not early:
        model.fuse_qkv_projections()
    close.assert_close(call_model(model, given), truth, before)


@torch.no_grad()
def test_masks_go_to_the_original():
    model = cogvideox.cogvideox(**ROTARY)
    attn, x, context = model.transformer_blocks[0].attn1, randn(2, 45, 96), randn(2, 7, 96)
    mask = torch.zeros(2, 1, 52).masked_fill_(torch.arange(52) > 40, -10000.0)
    before = attn(x, encoder_hidden_states=context, attention_mask=mask)
    fastdit.accelerate(model)
    for a, b in zip(attn(x, encoder_hidden_states=context, attention_mask=mask), before, strict=True):
        close.assert_bitwise(a, b)


@pytest.mark.parametrize("config, frames", [({}, 3), ({"patch_size_t": 2}, 6)], ids=["1.0", "1.5"])
@torch.no_grad()
def test_autocast(config, frames):
    model, given = cogvideox.cogvideox(**ROTARY, **config), cogvideox.inputs(frames=frames)
    with no_rounding():
        truth = call_model(exact(model), {k: v.double() if k.endswith("states") else v for k, v in given.items()})
    check_autocast(model, lambda m: call_model(m, given), truth)


def test_what_stays():
    model = cogvideox.cogvideox(**ROTARY, num_layers=4)
    blocks = model.transformer_blocks
    blocks[0].norm2.norm = nn.RMSNorm(96)
    blocks[1].adapter = nn.Linear(96, 96)
    blocks[2].attn1.norm_q = nn.RMSNorm(32, eps=1e-6)
    model.norm_out.chunk_dim = 0
    report = fastdit.accelerate(model)
    assert layers(report) == {
        "CogVideoX block": 2,
        "attention (CogVideoXAttnProcessor2_0)": 1,
        "feed-forward activation": 2,
        "patch embedding (Conv2d, kernel = stride)": 1,
    }
    assert "its norm is a RMSNorm, not a LayerNorm" in reasons(report)
    assert "has adapter, which the CogVideoXBlock that is known does not have" in reasons(report)
    assert "its query and key norms differ" in reasons(report)
    assert not any(row.layer == "attention (AttnProcessor2_0)" for row in report.rows)


@torch.no_grad()
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_block():
    model = cogvideox.cogvideox(**ROTARY)
    fastdit.accelerate(model)
    block = model.transformer_blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    for grid, text in (((3, 4, 5), 7), ((4, 5, 6), 11)):
        x, context, temb = randn(2, grid[0] * grid[1] * grid[2], 96), randn(2, text, 96), randn(2, 20)
        rope = cogvideox.rotary(grid, 32)
        for a, b in zip(compiled(x, context, temb, rope), block(x, context, temb, rope), strict=True):
            close.assert_bitwise(a, b)
