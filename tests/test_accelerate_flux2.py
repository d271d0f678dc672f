"""accelerate on diffusers' Flux.2: fused projections, reference tokens with cached keys, compilation, what stays."""

import contextlib

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import check_one_graph, layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import cast_tree, flux, flux2, randn

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def run(model, dtype=torch.float32, **more):
    given = {k: v if k in flux.KEEPS else cast_tree(v, dtype) for k, v in flux2.inputs(**more).items()}
    with no_rounding() if dtype == torch.float64 else contextlib.nullcontext():
        return model(**given, return_dict=False)[0]


@each_dtype
@torch.no_grad()
def test_head_width(dtype):
    """Heads of 128 and the axes of the released models."""
    config = dict(num_layers=1, num_single_layers=1, attention_head_dim=128, axes_dims_rope=(32, 32, 32, 32))
    model = flux2.flux2(guidance_embeds=False, **config).to(dtype)
    truth, before = run(exact(model), torch.float64), run(model, dtype)
    fastdit.accelerate(model)
    close.assert_close(run(model, dtype), truth, before)


@torch.no_grad()
def test_fused_projections():
    model = flux2.flux2(guidance_embeds=False)
    truth, before = run(exact(model), torch.float64), run(model)
    model.fuse_qkv_projections()
    assert fastdit.accelerate(model).replaced == sum(flux2.LAYERS.values())
    close.assert_close(run(model), truth, before)


@torch.no_grad()
def test_reference_tokens():
    """Their processors, which keep and use keys, stay; the blocks take a row of modulation per token."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    model = flux2.flux2(guidance_embeds=False)
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    options = dict(kv_cache_mode="extract", num_ref_tokens=4)
    truth, before = run(exact(model), torch.float64, **options), run(model, **options)
    report = fastdit.accelerate(model)
    left = {k: n for k, n in flux2.LAYERS.items() if not k.startswith("attention")}
    assert layers(report) == {**left, "feed-forward activation (SwiGLU)": 6}
    assert "its processor is Flux2KVAttnProcessor, not Flux2AttnProcessor" in reasons(report)
    assert "its processor is Flux2KVParallelSelfAttnProcessor, not Flux2ParallelSelfAttnProcessor" in reasons(report)
    close.assert_close(run(model, **options), truth, before)


@torch.no_grad()
def test_streams_may_come_and_go_apart():
    model = flux2.flux2()
    block = model.single_transformer_blocks[0]
    x, context, mod = randn(2, 5, 72), randn(2, 3, 72, seed=2), randn(1, 1, 3 * 72)
    truth = exact(block)(x.double(), context.double(), mod.double(), split_hidden_states=True)
    before = block(x, context, mod, split_hidden_states=True)
    fastdit.accelerate(model)
    for mine, true, base in zip(block(x, context, mod, split_hidden_states=True), truth, before, strict=True):
        close.assert_close(mine, true, base)


@torch.no_grad()
def test_compiled_block():
    """One graph for all lengths."""
    model = flux2.flux2()
    fastdit.accelerate(model)

    def call(tokens):
        angle = randn(tokens, 24)
        return randn(2, tokens, 72), None, randn(2, 3 * 72), (angle.cos(), angle.sin())

    check_one_graph(model.single_transformer_blocks[0], map(call, (15, 12, 20)))


def test_what_stays():
    model = flux2.flux2()
    double, single = model.transformer_blocks, model.single_transformer_blocks
    double[0].norm1_context = nn.RMSNorm(72)
    double[1].ff.act_fn.gate_fn = nn.Tanh()
    single[0].attn.mlp_act_fn.gate_fn = nn.Tanh()
    single[1].adapter = nn.Linear(72, 72)
    report = fastdit.accelerate(model)
    assert layers(report) == {
        "Flux.2 double block": 1,
        "Flux.2 single block": 1,
        "attention (Flux2AttnProcessor)": 1,
        "feed-forward activation (SwiGLU)": 1,
        "output norm (AdaLayerNormContinuous)": 1,
    }
    assert reasons(report) >= {
        "its norm is a RMSNorm, not a LayerNorm without parameters",
        "its MLP is not SwiGLU",
        "has adapter, which the Flux2SingleTransformerBlock that is known does not have",
    }
