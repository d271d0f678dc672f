"""accelerate on output norms that the model itself modulates: one pass, in any dtype, and the norm to anybody else."""

import pytest
import torch
from torch import nn

import fastdit
from fastdit.integrations.deferred_norm import Deferred
from fastdit.testing import close
from fastdit.testing.accelerated import check_autocast, layers, reasons
from fastdit.testing.exact import exact
from fastdit.testing.zoo import pixart

KIND = "output norm (modulated by the model)"


def deferred(x, scale, shift):
    return Deferred(x, 1e-6) * (1 + scale) + shift


@pytest.mark.parametrize("rows", [1, 6], ids=["a row per sample", "a row per token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_three_steps_in_one(rows, dtype, monkeypatch):
    x, scale, shift = (torch.randn(2, n, 24, dtype=torch.float64) for n in (6, rows, rows))
    truth = deferred_eagerly(x, scale, shift)
    given = [t.to(dtype) for t in (x, scale, shift)]
    before = deferred_eagerly(*given)
    monkeypatch.setattr(Deferred, "dense", lambda self: pytest.fail("the norm was computed on its own"))
    close.assert_close(deferred(*given), truth, before)
    close.assert_bitwise(given[2] + (1 + given[1]) * Deferred(given[0], 1e-6), deferred(*given))


def deferred_eagerly(x, scale, shift):
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def test_every_scale_comes_back():
    """In bf16 all below 256: (1 + scale) - 1 is a scale with the same 1 + scale."""
    scale = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    factor = 1 + scale[scale.abs() < 256]
    close.assert_bitwise(1 + (factor - 1), factor)


def test_to_anybody_else_it_is_the_norm():
    x = torch.randn(2, 6, 24)
    norm, factor = nn.LayerNorm(24, eps=1e-6, elementwise_affine=False), torch.randn(2, 1, 24)
    n, waits = norm(x), Deferred(x, 1e-6)
    close.assert_bitwise(waits + factor, n + factor)
    close.assert_bitwise(waits * 2 + factor, n * 2 + factor)
    close.assert_bitwise(waits * factor.double() + factor, n * factor.double() + factor)
    close.assert_bitwise(waits * factor * factor, n * factor * factor)
    close.assert_bitwise(waits * factor + 1, n * factor + 1)
    close.assert_bitwise(factor * waits, n * factor)
    close.assert_bitwise(waits.flatten(1), n.flatten(1))
    close.assert_bitwise(torch.cat([waits, n]), torch.cat([n, n]))
    for operation in (
        *(lambda t: t[:, 1:], lambda t: 2 * t, lambda t: 1 + t, lambda t: 1 - t, lambda t: t - factor, lambda t: t / 2),
        *(lambda t: -t, lambda t: t @ factor.mT, lambda t: t**2, lambda t: torch.stack(list(t)), lambda t: 1 / t),
    ):
        close.assert_bitwise(operation(waits), operation(n))
    assert len(waits) == len(n) and waits.ndim == n.ndim
    assert waits.shape == n.shape and waits.device == n.device and waits.dtype == n.dtype


@torch.no_grad()
def test_the_model_does_not_compute_it(monkeypatch):
    model, given = pixart.pixart(), pixart.inputs()
    assert layers(fastdit.accelerate(model))[KIND] == 1
    monkeypatch.setattr(Deferred, "dense", lambda self: pytest.fail("the norm was computed on its own"))
    model(**given)


def test_a_hook_added_later_gets_the_norm():
    model, given, seen = pixart.pixart(num_layers=1), pixart.inputs(), []
    truth, before = exact(model)(**pixart.MODELS[1].given(torch.float64)).sample, model(**given).sample
    fastdit.accelerate(model)
    handle = model.norm_out.register_forward_hook(lambda module, inputs, output: seen.append(output))
    close.assert_close(model(**given).sample, truth, before)
    assert type(seen[0]) is torch.Tensor
    handle.remove()
    model.norm_out.register_full_backward_hook(lambda module, *gradients: seen.append(gradients))
    model(**given).sample.sum().backward()
    assert len(seen) == 2


@torch.no_grad()
def test_autocast():
    model, given = pixart.pixart(), pixart.inputs()
    truth = exact(model)(**pixart.MODELS[1].given(torch.float64)).sample
    check_autocast(model, lambda m: m(**given).sample, truth)


@pytest.mark.full  # LTX's is compiled in its own tests
@torch.no_grad()
def test_compiled_model():
    model, given = pixart.pixart(num_layers=1), pixart.inputs()
    fastdit.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close.assert_bitwise(compiled(**given).sample, model(**given).sample)


def test_what_stays():
    model = pixart.pixart(num_layers=1)
    model.norm_out = nn.LayerNorm(60)
    assert "its norm is a LayerNorm, not a LayerNorm without parameters" in reasons(fastdit.accelerate(model))
    model = pixart.pixart(num_layers=1)
    model.norm_out.register_forward_hook(lambda module, inputs, output: None)
    assert "LayerNorm carries a hook, which expects a tensor" in reasons(fastdit.accelerate(model))
