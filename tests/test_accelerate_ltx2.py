"""accelerate on diffusers' LTX-2: one direction between the streams, the compiled block, what stays."""

import math

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import ltx2

WIDTHS = (6 * 44, 6 * 20, 4 * 44, 4 * 20, 44, 20)


def block_inputs(model, grid=(2, 3, 5), audio=9, text=7):
    sizes = ((math.prod(grid), 44), (audio, 20), (text, 44), (text, 20))
    streams = [torch.randn(2, *size) for size in sizes]
    coords = model.rope.prepare_video_coords(2, *grid, torch.device("cpu"))
    audio_coords = model.audio_rope.prepare_audio_coords(2, audio, torch.device("cpu"))
    rope = model.rope(coords), model.audio_rope(audio_coords)
    rope += model.cross_attn_rope(coords[:, :1]), model.cross_attn_audio_rope(audio_coords[:, :1])
    return [*streams, *(torch.randn(2, 1, width) for width in WIDTHS), None, None, *rope]


def doubled(value):
    return value.double() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("a2v, v2a", [(True, False), (False, True)], ids=["audio-to-video", "video-to-audio"])
@torch.no_grad()
def test_one_direction(a2v, v2a):
    model = ltx2.ltx2(num_layers=1)
    block, call = model.transformer_blocks[0], block_inputs(model)
    flags = dict(use_a2v_cross_attention=a2v, use_v2a_cross_attention=v2a)

    def run(block, call):
        return torch.cat([t.flatten() for t in block(*call, **flags)])

    truth, before = run(exact(block), [doubled(value) for value in call]), run(block, call)
    fastdit.accelerate(block)
    close.assert_close(run(block, call), truth, before)


@pytest.mark.parametrize("cross", [True, False], ids=["sigma of the other stream", "own timestep"])
@torch.no_grad()
def test_a_timestep_per_token_is_embedded_once_each(cross):
    """Also those of the attention between the streams, whose rows then stand beside rows of the whole sample."""
    entry = ltx2.entry("", ltx2.LTX23, newer=True, use_cross_timestep=cross)
    model, rows = entry.build(), []
    model.time_embed.linear.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    model.av_cross_attn_video_a2v_gate.linear.register_forward_hook(lambda module, inputs, y: rows.append(len(y)))
    with no_rounding():
        truth = entry.call(exact(model), entry.given(torch.float64))
    before = entry.call(model, entry.given(torch.float32))
    fastdit.accelerate(model)
    close.assert_close(entry.call(model, entry.given(torch.float32)), truth, before)
    assert rows == [60, 2 if cross else 60] * 2 + [3, 2 if cross else 3]


def test_what_stays():
    model = ltx2.ltx2()
    first, second = model.transformer_blocks
    first.audio_norm3 = nn.RMSNorm(20)
    second.attn2.norm_k = nn.LayerNorm(44)
    report = fastdit.accelerate(model)
    replaced = layers(report)
    assert replaced["LTX-2 block"] == 1 and replaced["attention (LTX2Attention)"] == 5
    assert {
        "its norm is a RMSNorm, not diffusers' RMSNorm without weights",
        "its norms are not nn.RMSNorm with weights and one eps",
    } <= reasons(report)


@torch.no_grad()
def test_compiled_block():
    model = ltx2.ltx2(num_layers=1, gated_attn=True, audio_gated_attn=True)
    fastdit.accelerate(model)
    block = model.transformer_blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for grid, audio, text in (((3, 5, 7), 9, 7), ((7, 8, 10), 13, 11)):
            call = block_inputs(model, grid, audio, text)
            for one, other in zip(compiled(*call), block(*call), strict=True):
                close.assert_bitwise(one, other)
