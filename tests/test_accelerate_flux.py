"""accelerate on diffusers' Flux models: masks, fused projections, IP adapters, fp16, compilation, what stays."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import check_one_graph, layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import cast_tree, flux, flux_kin, randn

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def run(model, given, dtype=torch.float32):
    given = {k: v if k in flux.KEEPS else cast_tree(v, dtype) for k, v in given.items()}
    return model(**given, return_dict=False)[0]


def assert_as_before(model, given, dtype=torch.float32):
    """The accelerated model against the original; gives the report."""
    model.to(dtype)
    with torch.no_grad(), no_rounding():
        truth = run(exact(model), given, torch.float64)
    with torch.no_grad():
        before = run(model, given, dtype)
        report = fastdit.accelerate(model)
        close.assert_close(run(model, given, dtype), truth, before)
    return report


@each_dtype
def test_head_width(dtype):
    """Heads of 128 and the axes of the released models."""
    model = flux.flux(num_layers=1, num_single_layers=1, attention_head_dim=128, axes_dims_rope=(16, 56, 56))
    assert_as_before(model, flux.inputs(), dtype)


def test_fused_projections():
    model, given = flux.flux(), flux.inputs()
    with torch.no_grad():
        before = run(model, given)
        model.fuse_qkv_projections()
        truth = run(exact(model), given, torch.float64)
        report = fastdit.accelerate(model)
        close.assert_close(run(model, given), truth, before)
    assert report.replaced == sum(flux.LAYERS.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=["bias", "mask"])
def test_masks_keep_the_attention_of_diffusers(dtype):
    """Chroma makes a mask over pairs of tokens, which may be a bias; Bria is given one."""
    text = torch.arange(flux.TEXT) < torch.tensor([[3], [flux.TEXT]])
    tokens = torch.cat([text, torch.ones(2, flux_kin.TOKENS, dtype=torch.bool)], dim=1)
    assert_as_before(flux_kin.chroma(), flux_kin.inputs(attention_mask=tokens.to(dtype)))
    bria = flux_kin.build("BriaTransformer2DModel")
    mask = tokens[:, None, None, :].to(dtype)
    plain = run(bria, flux_kin.inputs())
    assert_as_before(bria, flux_kin.inputs(attention_kwargs={"attention_mask": mask}))
    assert not torch.equal(run(bria, flux_kin.inputs(attention_kwargs={"attention_mask": mask})), plain)


def test_ip_adapter():
    """Its processor stays, and its third output is added by the block."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = flux.flux()
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(72, 16))
    images = randn(2, 1, 4, 16)
    given = {**flux.inputs(), "joint_attention_kwargs": {"ip_hidden_states": [images[:, 0]]}}
    model = flux.randomize(model)
    with torch.no_grad():
        given64 = {**given, "joint_attention_kwargs": {"ip_hidden_states": [images[:, 0].double()]}}
        truth, before = run(exact(model), given64, torch.float64), run(model, given)
        report = fastdit.accelerate(model)
        close.assert_close(run(model, given), truth, before)
    assert "its processor is FluxIPAdapterAttnProcessor, not FluxAttnProcessor" in reasons(report)
    assert sum(row.count for row in report.rows if row.layer == "Flux double block" and row.replaced) == 2


@torch.no_grad()
def test_fp16_stays_within_its_range():
    """The text of a double block and both streams of a single one, as the originals."""
    model = flux.flux().half()
    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    for norm, last in ((double.norm1_context, double.ff_context.net[2]), (single.norm, single.proj_out)):
        norm.linear.bias[-72:] = 50.0
        last.bias.fill_(60000.0)
    x, context, temb = (randn(1, n, 72).half() for n in (5, 3, 1))
    want = [block(x, context, temb[:, 0]) for block in (double, single)]
    fastdit.accelerate(model)
    got = [block(x, context, temb[:, 0]) for block in (double, single)]
    for text, image in ((got[0][0], want[0][0]), got[1], want[1]):
        assert (text == 65504).all() and (image == 65504).all()


@torch.no_grad()
def test_compiled_blocks():
    """One graph for all lengths of text and image."""
    model = flux.flux()
    fastdit.accelerate(model)

    def call(image, text):
        angle = randn(image + text, 24)
        x, context, temb = randn(2, image, 72), randn(2, text, 72, seed=2), randn(2, 72, seed=3)
        return x, context, temb, (angle.cos(), angle.sin())

    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        check_one_graph(block, (call(*lengths) for lengths in ((15, 7), (12, 9), (20, 4))))


def test_what_stays():
    model = flux.flux(num_layers=4)
    blocks = model.transformer_blocks
    blocks[0].norm2 = nn.LayerNorm(72)
    blocks[1].adapter = nn.Linear(72, 72)
    blocks[2].attn.norm_k = nn.RMSNorm(24, eps=1e-3)
    blocks[3].attn.processor = copy.copy(blocks[3].attn.processor)
    blocks[3].attn.processor._attention_backend = "native"
    model.single_transformer_blocks[0].act_mlp = nn.GELU()
    model.single_transformer_blocks[1].norm.linear = nn.Linear(72, 2 * 72)
    report = fastdit.accelerate(model)
    assert layers(report) == {
        "Flux double block": 2,
        "feed-forward activation": 4,
        "output norm (AdaLayerNormContinuous)": 1,
    }
    assert reasons(report) >= {
        "its norm is a LayerNorm, not a LayerNorm without parameters",
        "has adapter, which the FluxTransformerBlock that is known does not have",
        "its query and key norms differ",
        "another attention backend was chosen for it",
        "its MLP is neither GELU (tanh) nor SwiGLU",
        "its modulation does not make 3 tables of the tokens' width",
        "inside a block that is left",
    }
