"""accelerate on Wan's own repositories: rows of modulation, padded samples, what is left."""

import pytest
import torch

import fastdit
from fastdit.integrations.wan_block import Rows
from fastdit.testing import close, models
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import wan_native
from fastdit.testing.zoo.wan_native import Wan21, Wan22, call, inputs, wan


def truth_of(model, given):
    wide = {k: [u.double() for u in v] if isinstance(v, list) else v for k, v in given.items()}
    with no_rounding():
        return call(exact(model), wide)


@pytest.mark.parametrize("per_token, rows", [(False, (2, 1, 6, 48)), (True, (3, 6, 48))], ids=["t", "t-per-token"])
@torch.no_grad()
def test_few_timesteps_are_few_rows(per_token, rows):
    model, given = wan(Wan22), inputs((2, 3, 4), (1, 4, 3), seq_len=25, per_token=per_token)
    truth, before = truth_of(model, given), call(model, given)
    fastdit.accelerate(model, exclude=["blocks.1", "head"])
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["e"]), with_kwargs=True)
    close.assert_close(call(model, given), truth, before)
    assert isinstance(seen[0], Rows) and seen[0].table.shape == rows
    assert seen[1].shape == (2, 25, 6, 48)  # a block that is left gets what the original gives it


@torch.no_grad()
def test_keys_behind_the_end_of_a_sample_do_not_exist():
    """Two videos of different sizes in one batch, each as alone: the padding of the shorter one is no key."""
    model = wan(Wan21)
    given = inputs((2, 3, 4), (1, 4, 3), seq_len=25)
    fastdit.accelerate(model)
    alone = {k: v[1:] if k != "seq_len" else 12 for k, v in given.items()}
    both, short = model(**given), model(**alone)
    truth = exact_videos(wan(Wan21), alone)[0]
    close.assert_close(both[1], truth, short[0])


def exact_videos(model, given):
    wide = {k: [u.double() for u in v] if isinstance(v, list) else v for k, v in given.items()}
    with no_rounding():
        return exact(model)(**wide)


@torch.no_grad()
def test_fp32_latents_in_a_bf16_model_under_autocast():
    """As the pipelines call it: the patch embedding casts them."""
    model, given = wan(Wan22).bfloat16(), inputs((2, 3, 4), seq_len=24)
    truth, before = truth_of(model, given), call(model, given)
    fastdit.accelerate(model)
    close.assert_close(call(model, given), truth, before)


def test_what_stays():
    class Skips(wan_native.WanAttentionBlock):
        def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
            return x + super().forward(x, e, seq_lens, grid_sizes, freqs, context, context_lens)

    class Cached(wan_native.Wan22):
        steps = 0

        def forward(self, x, t, context, seq_len, y=None):
            return self.steps

    model = wan(type("Fork", (Wan21,), {"block": Skips}))
    report = fastdit.accelerate(model)
    assert any("something else than a WanAttentionBlock" in row.why for row in report.rows)
    assert all("forward" not in m.__dict__ for m in model.blocks.modules())

    model = wan(Wan21)
    model.blocks[0].self_attn.window_size = (8, 8)
    report = fastdit.accelerate(model)
    assert any(row.why == "its window_size is (8, 8), not (-1, -1)" for row in report.rows)
    assert "forward" in model.blocks[0].__dict__ and "forward" not in model.blocks[0].self_attn.__dict__

    report = fastdit.accelerate(wan(Cached))
    assert any(row.why.startswith("has steps") for row in report.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_head_without_autocast(dtype):
    """Wan-Animate-2's in diffusers: the same formula, its projection in the dtype of the tokens."""
    transformer = pytest.importorskip("diffusers.models.transformers.transformer_wan_animate_2")
    head = models.randomize(transformer.Head(48, 4, (1, 2, 2)))
    head.head.to(dtype)
    x, e = torch.randn(2, 5, 48).to(dtype), torch.randn(2, 48)
    with no_rounding():
        truth = exact(head)(x.double(), e.double())
    before = head(x, e)
    report = fastdit.accelerate(head)
    assert [row.layer for row in report.rows if row.replaced] == ["head (Wan-Video)"]
    assert head(x, e).dtype == dtype
    close.assert_close(head(x, e), truth, before)
