"""Every model class that `accelerate` knows: outputs and gradients as before, and nothing left behind by `restore`.

A test of one model only (an option, a refusal) stands in tests/test_accelerate_<codebase>.py.
"""

import copy

import pytest
import torch

import fastdit
from fastdit.integrations import KINDS
from fastdit.testing import close, models, zoo
from fastdit.testing.accelerated import layers
from fastdit.testing.exact import exact, no_rounding

each_model = pytest.mark.parametrize("entry", zoo.models(), ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def truth_of(entry, model, run):
    with no_rounding():
        return run(exact(model), entry.given(torch.float64))


def attributes(model):
    """Which objects the modules hold; not lists, which a VAE's cache makes anew in every call."""
    return {n: {k: id(v) for k, v in m.__dict__.items() if type(v) is not list} for n, m in model.named_modules()}


@each_model
@each_dtype
@torch.no_grad()
def test_output(entry, dtype):
    """In the dtype as `from_pretrained(torch_dtype=dtype)` gives it: modules that the class keeps in fp32 stay so."""
    model, given = models.cast(entry.build(), dtype), entry.given(dtype)
    truth, before = truth_of(entry, model, entry.call), entry.call(model, given)
    untouched = attributes(model)
    assert truth.dtype is torch.float64 and before.isfinite().all()
    report = fastdit.accelerate(model)
    assert layers(report) == entry.layers, report
    for layer, why in entry.kept.items():
        assert any(row.layer == layer and why in row.why for row in report.rows if not row.replaced), report
    after = entry.call(model, given)
    assert after.dtype == before.dtype and after.shape == before.shape
    close.assert_close(after, truth, before)
    fastdit.restore(model)
    assert attributes(model) == untouched
    close.assert_bitwise(entry.call(model, given), before)


@each_model
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.full)],
)
def test_gradients(entry, dtype):
    """Of all parameters and floating inputs in one comparison, each gradient in units of its own rms."""
    model = models.cast(entry.build(), dtype)

    def gradients(model, given):
        model.zero_grad()
        leaves = {k: v.requires_grad_() for k, v in given.items() if k not in entry.fixed and floating(v)}
        entry.call(model, given).square().mean().backward()
        named = {**dict(model.named_parameters()), **leaves}
        return {name: p.grad for name, p in named.items() if p.grad is not None}

    truth = truth_of(entry, model, gradients)
    before = gradients(model, entry.given(dtype))
    fastdit.accelerate(model)
    after = gradients(model, entry.given(dtype))
    assert after.keys() == before.keys() == truth.keys()
    assert all(after[name].dtype == g.dtype and after[name].shape == g.shape for name, g in before.items())
    rms = {name: g.square().mean().sqrt() for name, g in truth.items()}
    # zero but for fp64's own rounding: keys' biases, which a softmax does not see
    scales = {name: scale for name, scale in rms.items() if scale > 1e-12 * max(rms.values())}
    pooled = [torch.cat([(g[n].double() / s).flatten() for n, s in scales.items()]) for g in (after, truth, before)]
    close.assert_close(pooled[0].to(dtype), pooled[1], pooled[2].to(dtype))


def floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@each_model
def test_checkpointing_and_copies(entry):
    """Gradient checkpointing calls blocks positionally; a deep copy is accelerated too, and on its own."""
    model, given = entry.build(), entry.given(torch.float32)
    fastdit.accelerate(model)
    with torch.no_grad():
        after = entry.call(model, given)
        close.assert_bitwise(entry.call(copy.deepcopy(model), given), after)
    if not getattr(model, "_supports_gradient_checkpointing", False):
        return
    model.train()
    model.enable_gradient_checkpointing()
    result = entry.call(model, given)
    result.square().mean().backward()
    close.assert_bitwise(result.detach(), after)


def test_every_block_kind_is_seen_here():
    seen = {layer for entry in zoo.models() for layer in entry.layers}
    assert {kind.name for kind in KINDS if kind.block} <= seen
