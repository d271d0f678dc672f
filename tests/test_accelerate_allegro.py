"""accelerate on diffusers' Allegro: the compiled block, and what stays."""

import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import layers, reasons
from fastdit.testing.zoo import allegro


@torch.no_grad()
def test_compiled_block():
    model = allegro.allegro(num_layers=1)
    fastdit.accelerate(model)
    block = model.transformer_blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for grid, text, lengths in (((4, 5, 6), 7, [3, 5]), ((8, 9, 10), 11, [9, 2])):
            x, context = torch.randn(2, grid[0] * grid[1] * grid[2], 48), torch.randn(2, text, 48)
            lengths, rope = torch.tensor(lengths, dtype=torch.int32), allegro.rotary(24, grid)
            call = x, context, torch.randn(2, 6 * 48), None, lengths, rope
            close.assert_bitwise(compiled(*call), block(*call))


def test_what_stays():
    model = allegro.allegro()
    first, second = model.transformer_blocks
    first.norm1 = nn.LayerNorm(48)
    second.attn1.group_norm = nn.GroupNorm(2, 48)
    report = fastdit.accelerate(model)
    replaced = layers(report)
    assert replaced["Allegro block"] == 1 and replaced["attention (AllegroAttnProcessor2_0)"] == 1
    assert reasons(report) >= {
        "its norm is a LayerNorm, not a LayerNorm without parameters",
        "norms inside the attention",
    }
