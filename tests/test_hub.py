"""Layers for Hugging Face's `kernels`: its contract, and each against the layer of diffusers that it stands for."""

import copy
import inspect
import json

import pytest
import torch
from diffusers.models import activations, normalization
from torch import nn

from fastdit.integrations import hub
from fastdit.testing import close, zoo
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.models import randomize

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
C, N = 48, 7


def original(name):
    return getattr(normalization, name, None) or getattr(activations, name)


def fused_heads():
    """Heads of a fused projection: a view."""
    return torch.randn(2, N, 3 * 2, C)[:, :, ::3]


def tokens(*rows):
    return lambda: [torch.randn(2, N, C), *(torch.randn(2, width) for width in rows)]


# name, how diffusers makes it, its positional inputs
CASES = [
    ("AdaLayerNormZero", lambda c: c(C), lambda: [torch.randn(2, C, N).mT, None, None, None, torch.randn(2, C)]),
    (
        "AdaLayerNormZero",
        lambda c: c(C, norm_type="fp32_layer_norm"),
        lambda: [torch.randn(2, N, C), None, None, None, torch.randn(2, C)],
    ),
    ("AdaLayerNormZeroSingle", lambda c: c(C), tokens(C)),
    ("AdaLayerNormContinuous", lambda c: c(C, 20), tokens(20)),
    ("AdaLayerNormContinuous", lambda c: c(C, 20, elementwise_affine=False, eps=1e-6), tokens(20)),
    ("AdaLayerNormContinuous", lambda c: c(C, 20, norm_type="rms_norm"), tokens(20)),
    ("FP32LayerNorm", lambda c: c(C, eps=1e-6), tokens()),
    ("FP32LayerNorm", lambda c: c(C, elementwise_affine=False), lambda: [fused_heads()]),
    ("RMSNorm", lambda c: c(C, eps=1e-6), lambda: [fused_heads()]),
    ("RMSNorm", lambda c: c(C, eps=1e-6, bias=True), tokens()),
    ("RMSNorm", lambda c: c(C, eps=1e-6, elementwise_affine=False), lambda: [torch.randn(N, C)]),
    ("GELU", lambda c: c(C, 20, approximate="tanh"), tokens()),
    ("GEGLU", lambda c: c(C, 20), tokens()),
    ("SwiGLU", lambda c: c(C, 20), tokens()),
]


@pytest.mark.parametrize("name", hub.LAYERS)
def test_the_contract(name):
    """Stateless, without constructor or members of its own, with the signature of what it replaces."""
    layer, stands_for = getattr(hub.layers, name), original(name)
    assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
    own = {n for n, _ in inspect.getmembers(layer)} - {n for n, _ in inspect.getmembers(nn.Module)}
    assert own == {"has_backward", "can_torch_compile"} and layer.has_backward and layer.can_torch_compile
    ours, theirs = (list(inspect.signature(c.forward).parameters.values()) for c in (layer, stands_for))
    assert [(p.name, p.kind, p.default) for p in ours[1:]] == [(p.name, p.kind, p.default) for p in theirs[1:]]


def test_the_repository():
    """Where `kernels` looks: torch-<backend>/ with metadata and a module that has `layers`."""
    for device in ("cpu", "cuda"):
        folder = hub.REPOSITORY / f"torch-{device}"
        assert json.loads((folder / "metadata.json").read_text())["backend"] == {"type": device}
        assert "import layers" in (folder / "__init__.py").read_text()
    assert {case[0] for case in CASES} == set(hub.LAYERS)


@pytest.mark.parametrize("name, make, inputs", CASES)
@each_dtype
def test_layer(name, make, inputs, dtype):
    """Outputs and gradients of diffusers' layer under our forward."""
    layer = randomize(make(original(name))).to(dtype)
    given = [a if a is None else a.to(dtype) for a in inputs()]
    theirs, ours = original(name).forward, getattr(hub.layers, name).forward

    def run(forward, module, to):
        leaves = [a if a is None else a.to(to, copy=True).requires_grad_() for a in given]
        outputs = forward(module, *leaves)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        sum(o.double().square().sum() for o in outputs).backward()
        grads = [p.grad for p in module.parameters()] + [a.grad for a in leaves if a is not None]
        return [o.detach() for o in outputs], grads

    with no_rounding():
        truth = run(theirs, exact(layer), torch.float64)
    before, after = run(theirs, copy.deepcopy(layer), dtype), run(ours, copy.deepcopy(layer), dtype)
    for actual, right, rough in zip(after[0], truth[0], before[0], strict=True):
        assert actual.dtype == rough.dtype == dtype and actual.shape == rough.shape
        close.assert_close(actual, right, rough)
    scales = [g.square().mean().sqrt() for g in truth[1]]
    pooled = [
        torch.cat([(g.double() / s).flatten() for g, s in zip(grads, scales, strict=True)])
        for grads in (after[1], truth[1], before[1])
    ]
    close.assert_close(pooled[0].to(dtype), pooled[1], pooled[2].to(dtype))


@torch.no_grad()
def test_mixed_dtypes_are_the_originals():
    """An fp32 weight makes diffusers' RMSNorm return fp32."""
    norm, x = randomize(normalization.RMSNorm(C, eps=1e-6)), torch.randn(2, N, C).bfloat16()
    after = hub.layers.RMSNorm.forward(norm, x)
    assert after.dtype == torch.float32
    close.assert_bitwise(after, norm(x))


@torch.no_grad()
def test_kernelize(monkeypatch):
    """With the real package: a whole DiT, its layers marked, mapped and replaced from the local path."""
    kernels = pytest.importorskip("kernels")
    if not hasattr(kernels, "kernelize"):
        pytest.skip("kernels is not installed: that was this repository's folder")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in hub.LAYERS:  # taken back after the test
        for attribute in ("kernel_layer_name", "kernel_condition"):
            monkeypatch.setattr(original(name), attribute, None, raising=False)
    hub.mark_diffusers()
    entry = next(e for e in zoo.models() if str(e) == "DiTTransformer2DModel")
    model, given = entry.build(), entry.given(torch.float32)
    truth, before = entry.call(exact(model), entry.given(torch.float64)), entry.call(model, given)
    with kernels.use_kernel_mapping(hub.mapping(), inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, use_fallback=False)
    layers = {type(m).__name__: m.forward.__func__ for m in model.modules() if "forward" in m.__dict__}
    assert layers == {name: getattr(hub.layers, name).forward for name in ("AdaLayerNormZero", "GELU")}
    close.assert_close(entry.call(model, given), truth, before)
