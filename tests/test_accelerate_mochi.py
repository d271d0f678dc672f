"""accelerate on diffusers' MochiTransformer3DModel: text masks, what stays, autocast, a compiled block."""

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import check_autocast, layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import call_model, mochi as zoo, randn

C, TEXT = 48, 40


def outputs(model, given):
    with no_rounding():
        double = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        return call_model(exact(model), double), call_model(model, given)


def block_inputs(model, grid=(2, 3, 5), text=7, lengths=(3, 6)):
    mask = torch.arange(text) < torch.tensor(lengths)[:, None]
    rope = model.rope(model.pos_frequencies, *grid, dtype=torch.float32)
    x, context = randn(2, grid[0] * grid[1] * grid[2], C), randn(2, text, TEXT, seed=2)
    return x, context, randn(2, C, seed=3), mask, rope


@pytest.mark.parametrize("lengths", [(3, 7), (0, 1)])
@torch.no_grad()
def test_padded_text(lengths):
    """Eager gives padded text the bias of the output layer, and so does this; a sample may have no text at all."""
    model = zoo.mochi()
    given = block_inputs(model, lengths=lengths)
    with no_rounding():
        truth = exact(model.transformer_blocks[0])(*(t.double() for t in given[:3]), *given[3:])
    before = model.transformer_blocks[0](*given)
    fastdit.accelerate(model)
    for a, t, b in zip(model.transformer_blocks[0](*given), truth, before, strict=True):
        close.assert_close(a, t, b)


@torch.no_grad()
def test_blocks_around_a_left_attention():
    model, given = zoo.mochi(), zoo.inputs(holes=True)
    truth, before = outputs(model, given)
    report = fastdit.accelerate(model, ops={"norm_modulate", "gate_residual_norm_modulate", "gate_residual"})
    assert layers(report) == {"Mochi block": 3, "output norm (AdaLayerNormContinuous)": 1}
    close.assert_close(call_model(model, given), truth, before)


@torch.no_grad()
def test_autocast():
    model, given = zoo.mochi(), zoo.inputs()
    truth, _ = outputs(model, given)
    check_autocast(model, lambda m: call_model(m, given), truth)


def test_what_stays():
    model = zoo.mochi()
    blocks = model.transformer_blocks
    blocks[0].norm3.norm = nn.RMSNorm(C)
    blocks[1].attn1.norm_added_q.eps = 1e-6
    blocks[2].norm2.register_forward_hook(lambda *_: None)
    report = fastdit.accelerate(model)
    assert layers(report) == {
        "Mochi block": 1,
        "attention (MochiAttnProcessor2_0)": 1,
        "feed-forward activation": 3,
        "patch embedding (Conv2d, kernel = stride)": 1,
        "output norm (AdaLayerNormContinuous)": 1,
    }
    assert {
        "its norm is a MochiModulatedRMSNorm, not an RMSNorm without parameters",
        "its norms are not MochiRMSNorm with one eps",
        "MochiModulatedRMSNorm carries a hook, which would no longer run",
    } <= reasons(report)


@torch.no_grad()
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_block():
    model = zoo.mochi()
    fastdit.accelerate(model)
    block = model.transformer_blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    for grid, text in (((2, 3, 5), 7), ((3, 4, 6), 11)):
        given = block_inputs(model, grid, text)
        for a, b in zip(compiled(*given), block(*given), strict=True):
            close.assert_bitwise(a, b)
