"""accelerate on diffusers' JoyImage: masks over both streams, compilation, autocast, what stays."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing.accelerated import check_autocast, check_one_graph, layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import cast_tree, joyimage, randn


@torch.no_grad()
def test_compiled_block():
    """One graph for all lengths, with a rotation and a mask for each sample."""
    model = joyimage.plus(num_layers=1)
    fastdit.accelerate(model)

    def call(image, text):
        x, context, temb = randn(2, image, 72), randn(2, text, 72, seed=2), randn(2, 6, 72, seed=3)
        angles = randn(2, image, 12).repeat_interleave(2, dim=-1)
        mask = torch.arange(image + text) % 3 != torch.tensor([[1], [2]])
        return x, context, temb, (angles.cos(), angles.sin()), mask[:, None, None]

    check_one_graph(model.double_blocks[0], (call(*lengths) for lengths in ((15, 7), (12, 9))))


@torch.no_grad()
def test_autocast():
    """The tables are fp32, and so are the sums with them: the first block, whose tokens are not, stays as it was."""
    model = joyimage.joy()
    given = joyimage.inputs()
    with no_rounding():
        truth = exact(model)(**{k: v if k == "timestep" else cast_tree(v, torch.float64) for k, v in given.items()})
    check_autocast(model, lambda model: model(**given).sample, truth.sample)


@torch.no_grad()
def test_a_mask_that_is_not_of_keys():
    """A bias goes the original's way, and so does a call without text."""
    model = joyimage.plus(num_layers=1)
    attn, x, context = model.double_blocks[0].attn, randn(2, 5, 72), randn(2, 4, 72, seed=2)
    bias = randn(2, 1, 9, 9, seed=3)
    before = attn(x, context, None, bias)
    fastdit.accelerate(model)
    assert all(torch.equal(after, b) for after, b in zip(attn(x, context, None, bias), before, strict=True))
    with pytest.raises(ValueError, match="requires encoder_hidden_states"):
        attn(x)


def test_what_stays():
    model = joyimage.joy(num_layers=4)
    blocks = model.double_blocks
    blocks[0].txt_norm2 = nn.RMSNorm(72)
    blocks[1].img_mod.factor = 3
    blocks[2].attn.processor = copy.copy(blocks[2].attn.processor)
    blocks[2].attn.processor._attention_backend = "native"
    blocks[3].attn.txt_attn_k_norm = nn.Identity()
    model.img_in.padding = (0, 1, 1)
    report = fastdit.accelerate(model)
    assert layers(report) == {"JoyImage block": 2, "feed-forward activation": 4}
    assert reasons(report) >= {
        "its norm is a RMSNorm, not a LayerNorm without parameters",
        "its modulation is a JoyImageModulate, not six tables of its own",
        "another attention backend was chosen for it",
        "its query and key norm is a Identity, not an RMSNorm or a LayerNorm with an eps",
        "its convolution is not a plain nn.Conv3d",
    }
