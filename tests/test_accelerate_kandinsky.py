"""accelerate on diffusers' Kandinsky 5 and 6: compiled blocks, what stays."""

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import layers, reasons
from fastdit.testing.zoo import kandinsky


def test_what_stays():
    model = kandinsky.kandinsky6()
    first, second = model.visual_transformer_blocks
    first.audio_dec_block.feed_forward_norm = nn.LayerNorm(24)
    second.video_dec_block.adapter = nn.Linear(60, 60)
    model.video_text_transformer_blocks[0].attn.processor._attention_backend = "native"
    report = fastdit.accelerate(model)
    assert layers(report)["attention (Kandinsky)"] == 1
    assert {
        "its norm is a LayerNorm, not a LayerNorm without parameters",
        "has adapter, which the Kandinsky6TransformerDecoderBlock that is known does not have",
        "another attention backend was chosen for it",
    } <= reasons(report)


@torch.no_grad()
def test_sparse_attention_goes_to_the_original(monkeypatch):
    model, given = kandinsky.kandinsky5(), kandinsky.inputs5()
    fastdit.accelerate(model)
    processor = model.visual_transformer_blocks[0].self_attention.processor

    def original(*args):
        raise NotImplementedError("sparse")

    monkeypatch.setattr(processor, "original", original)
    with pytest.raises(NotImplementedError, match="sparse"):
        model(**given, sparse_params=dict(to_fractal=False))


@torch.no_grad()
def test_compiled_block():
    model = kandinsky.kandinsky5(num_visual_blocks=1)
    fastdit.accelerate(model)
    block = model.visual_transformer_blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for grid, text in (((3, 5, 7), 6), ((6, 8, 9), 11)):
            places = [torch.arange(n) for n in grid]
            rope = model.visual_rope_embeddings((1, *grid), places, (1.0, 2.0, 2.0)).flatten(1, 3)
            x, context = torch.randn(2, rope.shape[1], 60), torch.randn(2, text, 60)
            call = x, context, torch.randn(2, 16), rope, None
            close.assert_bitwise(compiled(*call), block(*call))
