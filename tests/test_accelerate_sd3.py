"""accelerate on diffusers' SD3: head width, ControlNets, chunked feed-forward, skipped layers, what stays."""

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import layers, reasons
from fastdit.testing.exact import exact
from fastdit.testing.zoo import cast_tree, sd3

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def run(model, dtype=torch.float32, **more):
    given = {k: v if k == "timestep" else cast_tree(v, dtype) for k, v in sd3.inputs(**more).items()}
    return model(**given, return_dict=False)[0]


@each_dtype
@torch.no_grad()
def test_head_width(dtype):
    """SD3.5 medium's heads of 64, two attentions, and the last block, whose text ends there."""
    config = dict(num_layers=2, attention_head_dim=64, caption_projection_dim=192)
    model = sd3.sd3(**{**sd3.MEDIUM, **config}).to(dtype)
    truth, before = run(exact(model), torch.float64), run(model, dtype)
    fastdit.accelerate(model)
    close.assert_close(run(model, dtype), truth, before)


@torch.no_grad()
def test_chunked_feed_forward_and_skipped_layers():
    model = sd3.sd3(**sd3.LARGE)
    for m in (model, truth := exact(model)):
        m.enable_forward_chunking(1, dim=1)
    expected, before = run(truth, torch.float64), run(model)
    fastdit.accelerate(model)
    close.assert_close(run(model), expected, before)
    model.disable_forward_chunking()
    close.assert_close(run(model), expected, before)
    assert not torch.equal(run(model, skip_layers=[1]), run(model))


@torch.no_grad()
def test_fused_projections_keep_diffusers_processor():
    """It leaves the query and key norm out, so it is not the one that is known."""
    model = sd3.sd3()
    model.fuse_qkv_projections()
    report = fastdit.accelerate(model)
    assert "attention (JointAttnProcessor2_0)" not in layers(report) and layers(report)["SD3 joint block"] == 3


def test_what_stays():
    model = sd3.sd3(**sd3.MEDIUM)
    blocks = model.transformer_blocks
    blocks[0].norm1.linear = nn.Linear(72, 6 * 72)
    blocks[1].norm2_context = nn.RMSNorm(72)
    blocks[2].attn.norm_added_q = nn.LayerNorm(24)
    report = fastdit.accelerate(model)
    assert layers(report) == {
        "SD3 joint block": 1,
        "feed-forward activation": 1,
        "patch embedding (Conv2d, kernel = stride)": 1,
        "output norm (AdaLayerNormContinuous)": 2,
    }
    assert reasons(report) >= {
        "its modulation does not make 9 tables of the tokens' width",
        "its norm is a RMSNorm, not a LayerNorm without parameters",
        "its query and key norms differ",
    }
