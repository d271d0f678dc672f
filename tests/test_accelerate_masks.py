"""Masks over queries and keys that `accelerate` serves as runs of queries over a stretch of keys, and others."""

import random

import pytest
import torch
import torch.nn.functional as F

from fastdit.integrations import joint
from fastdit.integrations.masks import RUNS, Run, key_runs, runs_of
from fastdit.testing import close
from fastdit.testing.zoo import omnigen, randn

N = 25


def bias(shown, dtype=torch.float32):
    return (~shown).to(dtype) * torch.finfo(dtype).min


def images():
    """The pipeline's of two samples: text, time and image; the second is padded, the first has another image."""
    shown = omnigen.mask(9, 15, 0, 3).bool()
    shown[0, 2:8, 2:8] = True
    return shown[:, None]


def tokens(*, samples=2, keys=N):
    return tuple(randn(samples, n, 2, 24, seed=n + s) for s, n in enumerate((N, keys, keys)))


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask).transpose(1, 2)


SERVED = {
    "an image among text": images(),
    "the same bias": bias(images()),
    "a bias of infinities": torch.where(images(), 0.0, -torch.inf),
    "one for all samples": images()[:1],
    "causal": torch.ones(2, 1, N, N).tril().bool(),
    "keys alone": torch.arange(N).lt(torch.tensor([[4], [N]]))[:, None, None],
}


@pytest.mark.parametrize("mask", SERVED.values(), ids=SERVED)
def test_a_stretch_of_keys_for_each_query(mask, monkeypatch):
    monkeypatch.setattr("diffusers.models.attention_dispatch.dispatch_attention_fn", None)
    q, k, v = tokens()
    wide = mask if mask.dtype is torch.bool else mask.double()
    truth = sdpa(*(t.double() for t in (q, k, v)), wide)
    close.assert_close(joint.masked_attention(q, k, v, mask), truth, sdpa(q, k, v, mask))


HOLE, NOTHING, BLOCKS = images(), images(), torch.eye(RUNS + 1).bool().repeat(1, 1, 1, 1)
HOLE[1, 0, 20, 9] = False
NOTHING[1, 0, 20] = False
LEFT = {
    "a hole": HOLE,
    "a query that sees nothing": NOTHING,
    "weights": torch.where(images(), 0.0, -1.0),
    "each head its own": images().repeat(1, 2, 1, 1),
    "without the dim of heads": images()[0, 0],
}


@pytest.mark.parametrize("mask", LEFT.values(), ids=LEFT)
def test_other_masks_go_to_diffusers(mask):
    q, k, v = tokens()
    assert key_runs(mask, 2, N, N) is None
    close.assert_bitwise(joint.masked_attention(q, k, v, mask), sdpa(q, k, v, mask))


def test_too_many_runs_and_masks_that_do_not_fit():
    assert key_runs(BLOCKS[..., :RUNS, :], 1, RUNS, RUNS + 1) is not None
    assert key_runs(BLOCKS, 1, RUNS + 1, RUNS + 1) is None
    assert key_runs(images()[..., :1], 2, N, N) is None  # keys are broadcast
    assert key_runs(bias(images()).requires_grad_(), 2, N, N) is None
    assert key_runs(images(), 2, N, N) is not None
    assert torch.compile(lambda mask: mask + (key_runs(mask, 2, N, N) is None), backend="eager")(bias(images())).any()


def test_runs():
    assert runs_of([0] * 4, [4] * 4) == [Run(0, 4, 0, 4, False)]
    assert runs_of([0] * 4, [1, 2, 3, 4]) == [Run(0, 4, 0, 4, True)]
    assert runs_of([1, 1, 1, 1], [5, 6, 9, 9]) == [Run(0, 2, 1, 6, True), Run(2, 4, 1, 9, False)]
    draw = random.Random(0)
    for _ in range(200):
        starts = [draw.randrange(2) for _ in range(8)]
        stops = [draw.randrange(2, 6) for _ in range(8)]
        told = [
            (run.start, run.stop - (run.last - 1 - i) * run.causal)
            for run in runs_of(starts, stops)
            for i in range(run.first, run.last)
        ]
        assert told == list(zip(starts, stops, strict=True))
