"""Classifier-free guidance: its formula, one call of the model for both halves, and DiT's own."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastdit.diffusion import RectifiedFlow, gaussian_noise, guided
from fastdit.diffusion.guidance import joined
from fastdit.models import DiT
from fastdit.testing.close import assert_bitwise, assert_close
from fastdit.testing.models import randomize

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([300.0, 700.0])
TEXT, NULL = torch.tensor([1.0, -2.0]), torch.tensor([0.25, 0.5])


def model(x, t, text):
    """Linear in the condition; one sample alone gives what it gives in a batch."""
    if isinstance(x, Tensor):
        return x * text.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000
    return [v * c + s / 1000 for v, c, s in zip(x, text, t, strict=True)]


@pytest.mark.parametrize("scale", [0.0, 2.3, 7.0])
def test_formula_in_one_call(scale):
    calls = []

    def counted(x, t, text):
        calls.append(len(x))
        return model(x, t, text)

    found = guided(counted, TEXT, NULL, scale)(X, T)
    conditional, null = model(X, T, TEXT), model(X, T, NULL)
    truth = null.double() + scale * (conditional.double() - null.double())
    assert calls == [4]
    assert_close(found, truth, null + scale * (conditional - null))
    wide = (X.double(), T.double())
    conditional, null = model(*wide, TEXT.double()), model(*wide, NULL.double())
    assert_bitwise(guided(model, TEXT.double(), NULL.double(), scale)(*wide), null + scale * (conditional - null))


def test_lists_of_mixed_sizes():
    x = gaussian_noise([(3, 4, 4), (3, 1, 2, 6)])
    found = guided(model, TEXT, NULL, 3.0)(x, T)
    for i in range(2):
        assert_bitwise(found[i], guided(model, TEXT[i : i + 1], NULL[i : i + 1], 3.0)([x[i]], T[i : i + 1])[0])


def test_scale_one_is_the_model_alone():
    calls = []
    found = guided(lambda x, t, text: (calls.append(len(x)), model(x, t, text))[1], TEXT, None, 1)(X, T)
    assert calls == [2]
    assert_bitwise(found, model(X, T, TEXT))


def test_guidance_in_an_interval_of_times():
    calls = []

    def counted(x, t, text):
        calls.append(len(x))
        return model(x, t, text)

    f = guided(counted, TEXT, NULL, 3.0, interval=(500, 800))
    assert_bitwise(f(X, T - 250), model(X, T - 250, TEXT))  # none inside: one call without null
    mixed = f(X, T)  # the second sample inside
    assert_bitwise(mixed[1], guided(model, TEXT, NULL, 3.0)(X, T)[1])
    alone = model(X, T, TEXT)[0]
    assert_close(mixed[0], alone.double(), model(X, T, NULL)[0] + (alone - model(X, T, NULL)[0]))
    assert calls == [2, 4]


def test_rescale_has_the_spread_of_the_conditional():
    x = X.double()
    full = guided(model, TEXT, NULL, 7.0, rescale=1.0)(x, T)
    plain, conditional = guided(model, TEXT, NULL, 7.0)(x, T), model(x, T, TEXT)
    for i in range(2):
        spread = conditional[i].std()
        assert_close(full[i].std().float(), spread, spread.float())
        half = guided(model, TEXT, NULL, 7.0, rescale=0.5)(x, T)[i]
        truth = (plain[i] + full[i]) / 2
        assert_close(half.float(), truth, truth.float())
    zeros = guided(lambda x, t, text: torch.zeros_like(x), TEXT, NULL, 7.0, rescale=0.7)(x, T)
    assert not zeros.any()


def test_a_learned_variance_is_the_conditional_one_as_in_dit():
    """forward_with_cfg of facebookresearch/DiT, guiding all the channels of the noise."""
    net = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=10).eval()
    randomize(net)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 900.0]), torch.tensor([3, 7])
    null = torch.full_like(y, 10)
    with torch.no_grad():
        found = guided(net, y, null, 4.0)(x, t)
        expected = net.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), 4.0, channels=4)[:2]
        both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).double()
    truth = torch.cat([both[2:, :4] + 4.0 * (both[:2, :4] - both[2:, :4]), both[:2, 4:]], dim=1)
    assert_close(found, truth, expected)


def test_samples_with_guidance():
    """A guided sampler is the sampler of the guided function; lists and batches alike."""
    flow, noise = RectifiedFlow(), torch.randn(2, 3, 2, 2)
    f = guided(model, TEXT, NULL, 2.0)
    whole, parts = flow.sample(f, noise, 4), flow.sample(f, list(noise), 4)
    assert_bitwise(whole, torch.stack(parts))
    assert not torch.equal(whole, flow.sample(guided(model, TEXT, NULL, 1.0), noise, 4))


def test_the_examples_of_the_page_run(capsys):
    page = (Path(__file__).resolve().parent.parent / "docs" / "diffusion.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    names = dict(torch=torch, labels=torch.tensor([3]), latents=torch.randn(2, 8, 5, 8, 8))
    names |= dict(text=torch.ones(1), null=torch.zeros(1), model=lambda x, t, text: x * text.view(-1, 1, 1, 1, 1))
    names |= dict(dit=lambda x, t, y: torch.cat([x, x], dim=1) * 0.1)
    exec("\n".join(blocks), names)
    assert len(blocks) == 2 and names["latents"].shape == (1, 8, 5, 8, 8) and names["loss"].isfinite()
    assert capsys.readouterr().out.split("\n")[-2] == "30 30"


class Pair(NamedTuple):
    words: Tensor
    names: list


class Packed:
    def __init__(self, parts):
        self.parts = parts

    @staticmethod
    def cat(texts):
        return Packed([p for t in texts for p in t.parts])


def test_conditions_that_join():
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    both = torch.cat([a, b])
    assert_bitwise(joined(a, b), both)
    assert joined(["x"], [""]) == ["x", ""] and joined(None, None) is None
    assert_bitwise(joined({"a": a}, {"a": b})["a"], both)
    pair = joined(Pair(a, ["x"]), Pair(b, [""]))
    assert isinstance(pair, Pair) and pair.names == ["x", ""]
    assert_bitwise(pair.words, both)
    assert joined(Packed([1]), Packed([2])).parts == [1, 2]


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: guided(model, TEXT, NULL, 2.0, interval=(5, 1)), ValueError, "interval must be .lo, hi."),
        (lambda: guided(model, TEXT, NULL, 2.0, rescale=1.5), ValueError, r"rescale must lie in \[0, 1\]; got 1.5"),
        (lambda: guided(model, TEXT, None, 2.0), TypeError, "one type; got Tensor and NoneType"),
        (lambda: guided(model, TEXT, NULL[:1], 2.0), ValueError, "as many samples; got 2 and 1"),
        (lambda: guided(model, 1, 2, 2.0), TypeError, "cannot join conditions; got int"),
        (lambda: guided(model, {"a": TEXT}, {"b": NULL}, 2.0), TypeError, "cannot join conditions; got dict"),
        (lambda: guided(lambda x, t, c: x[:3], TEXT, NULL, 2.0)(X, T), ValueError, "one output per sample"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
