"""Outputs that bypass the caches: the same bits as those that do not, on every instruction set."""

from pathlib import Path

import pytest
import torch

from fastdit import _cpu, ops
from fastdit.testing import close

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
TOKENS, C = 37, 192  # whole lines of 64 bytes in every dtype; rows that groups of four do not divide
L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@pytest.fixture
def no_cache():
    before = _cpu.last_level_cache()
    yield lambda bypass: _cpu.set_last_level_cache(0 if bypass else 2**40)
    _cpu.set_last_level_cache(before)


def _norm_modulate(leaf):
    return ops.norm_modulate(leaf(2, TOKENS, C), shift=leaf(2, C), scale=leaf(2, C), backend="cpu")


def _norm_affine(leaf):
    return ops.norm_modulate(leaf(2, TOKENS, C), weight=leaf(C), bias=leaf(C), backend="cpu")


def _gate_residual(leaf):
    return ops.gate_residual(leaf(2, TOKENS, C), leaf(2, TOKENS, C), leaf(2, C), backend="cpu")


def _seam(leaf):
    x, y, gate = leaf(2, TOKENS, C), leaf(2, TOKENS, C), leaf(2, C)
    return ops.gate_residual_norm_modulate(x, y, gate, shift=leaf(2, C), scale=leaf(2, C), backend="cpu")


def _qk_norm_rope(layout, heads=3, channels=64):
    def call(leaf):
        angles = torch.arange(TOKENS)[:, None] * torch.logspace(0, -3, channels // 2)
        q, k, weight = (leaf(*shape) for shape in [(2, TOKENS, heads, channels)] * 2 + [(channels,)])
        rope = dict(cos=angles.cos(), sin=angles.sin(), layout=layout, norm="rms")
        return ops.qk_norm_rope(q, k, **rope, q_weight=weight, k_weight=weight, backend="cpu")

    return call


def _gated_activation(leaf):
    return ops.activation(leaf(2, TOKENS, C), act="silu", up=leaf(2, TOKENS, C), backend="cpu")


CALLS = {
    "norm_modulate": _norm_modulate,
    "norm_affine": _norm_affine,
    "gate_residual": _gate_residual,
    "seam": _seam,
    "qk_norm_rope-half": _qk_norm_rope("half"),
    "qk_norm_rope-interleaved": _qk_norm_rope("interleaved"),
    "qk_norm_rope-half-whole-tokens": _qk_norm_rope("half", 8, 88),  # heads end within lines, tokens do not
    "qk_norm_rope-interleaved-whole-tokens": _qk_norm_rope("interleaved", 8, 88),
    "activation": _gated_activation,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_same_bits(call, dtype, isa, no_cache):
    def run(bypass: bool) -> list[torch.Tensor]:
        no_cache(bypass)
        torch.default_generator.manual_seed(0)
        leaves: list[torch.Tensor] = []

        def leaf(*shape: int) -> torch.Tensor:
            leaves.append(torch.randn(shape).to(dtype).requires_grad_())
            return leaves[-1]

        out = call(leaf)
        outs = list(out) if isinstance(out, tuple) else [out]
        return [*outs, *torch.autograd.grad(outs, leaves, [torch.randn(o.shape).to(o.dtype) for o in outs])]

    for bypassed, cached in zip(run(True), run(False), strict=True):
        close.assert_bitwise(bypassed, cached)


@pytest.mark.skipif(not L3.exists(), reason="this system does not say what caches it has")
def test_size_of_the_last_cache():
    assert _cpu.last_level_cache() == int(L3.read_text().rstrip("K\n")) * 1024
