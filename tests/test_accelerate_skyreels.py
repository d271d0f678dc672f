"""accelerate on diffusers' SkyReels-V2: rows per frame, frame-causal attention without a mask, what is left."""

import torch

import fastdit
from fastdit.integrations.wan_block import Rows
from fastdit.testing import close
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import call_model, skyreels

CAUSAL = dict(num_frame_per_block=2)


def run(**accelerate):
    """The accelerated model, what its blocks were called with, and a check of its output against the original's."""
    model, given = skyreels.skyreels(**CAUSAL), skyreels.inputs(forcing=True)
    with no_rounding():
        wide = {k: v.double() if torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()}
        truth = call_model(exact(model), wide)
    before, seen = call_model(model, given), []
    fastdit.accelerate(model, **accelerate)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args))

    def check():
        seen.clear()
        close.assert_close(call_model(model, given), truth, before)

    check()
    return model, seen, check


@torch.no_grad()
def test_rows_and_frames():
    _, seen, _ = run()
    for _, _, temb, _, mask in seen:
        assert isinstance(temb, Rows) and temb.table.shape == (2, 4, 6, 48)
        assert mask.frame_tokens == 2 * 3 * 5


@torch.no_grad()
def test_a_block_that_is_left_gets_what_the_original_makes():
    _, seen, _ = run(exclude=["blocks.1"])
    _, _, temb, _, mask = seen[1]
    assert temb.shape == (2, 6, 60, 48) and mask.shape == (1, 1, 60, 60)
    group = torch.arange(60) // 30
    close.assert_bitwise(mask[0, 0], group <= group[:, None])
    assert isinstance(seen[0][2], Rows)


@torch.no_grad()
def test_an_attention_that_is_left_gets_the_mask():
    model, seen, check = run(ops={"norm_modulate", "gate_residual_norm_modulate", "gate_residual", "unpatchify3d"})
    assert all(mask.shape == (1, 1, 60, 60) for *_, mask in seen)
    fastdit.accelerate(model)
    model.set_attention_backend("native")  # the original's attention does the work, with its mask
    check()
    assert all(mask.shape == (1, 1, 60, 60) for *_, mask in seen)
