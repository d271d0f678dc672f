"""accelerate on diffusers' Cosmos: rows of modulation per frame, the ControlNet's block, what stays."""

import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import check_autocast, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.models import randomize
from fastdit.testing.zoo import cosmos


@torch.no_grad()
def test_modulation_is_made_once_per_frame():
    model, given = cosmos.cosmos(), cosmos.inputs(per_frame=True)
    seen = []
    for module in (model.transformer_blocks[0].norm2, model.norm_out):
        module.linear_1.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    model(**given)
    fastdit.accelerate(model)
    model(**given)
    assert seen == [(2, 45, 8)] * 2 + [(6, 8)] * 2
    fastdit.accelerate(model, exclude=["transformer_blocks.1"])  # which needs a row per token
    model(**given)
    assert seen[4:] == [(2, 45, 8)] * 2


@torch.no_grad()
def test_control_block():
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformerBlock

    block = randomize(CosmosTransformerBlock(3, 20, 28, adaln_lora_dim=8, before_proj=True, after_proj=True))
    g = torch.Generator().manual_seed(1)
    x, text, embedded, temb, latents = (
        torch.randn(2, *shape, generator=g) for shape in ((10, 60), (7, 28), (60,), (180,), (10, 60))
    )

    def run(block, dtype):
        call = (t.to(dtype) for t in (x, text, embedded, temb))
        return torch.cat(block(*call, latents=latents.to(dtype)))

    truth, before = run(exact(block), torch.float64), run(block, torch.float32)
    report = fastdit.accelerate(block)
    assert {row.layer for row in report.rows if row.replaced} >= {"Cosmos block", "attention (CosmosAttnProcessor)"}
    close.assert_close(run(block, torch.float32), truth, before)


@torch.no_grad()
def test_autocast():
    """Learned positions stay in fp32 and widen the stream."""
    entry = cosmos.MODELS[0]
    model, given = entry.build(), entry.given(torch.float32)
    with no_rounding():
        truth = entry.call(exact(model), entry.given(torch.float64))
    check_autocast(model, lambda m: entry.call(m, given), truth)


def test_what_stays():
    model = cosmos.cosmos()
    first, second = model.transformer_blocks
    first.norm2.norm = nn.LayerNorm(60)
    second.attn1.norm_k = nn.LayerNorm(20)
    report = fastdit.accelerate(model)
    assert {
        "its norm is a LayerNorm, not a LayerNorm without parameters",
        "its query and key norms differ",
        "inside a block that is left",
    } <= reasons(report)


@torch.no_grad()
def test_compiled_block():
    model = cosmos.cosmos(num_layers=1)
    fastdit.accelerate(model)
    block = model.transformer_blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frames, side, text in ((3, 4, 7), (5, 6, 9)):
            tokens = frames * side * side
            x, context, places = torch.randn(2, tokens, 60), torch.randn(2, text, 28), torch.randn(2, tokens, 60)
            rope = model.rope(torch.empty(2, 4, frames, 2 * side, 2 * side))
            call = x, context, torch.randn(2 * frames, 60), torch.randn(2 * frames, 180), rope, places
            close.assert_bitwise(compiled(*call), block(*call))
