"""Host cost of a call: what an op adds to its allocations, beside F.layer_norm in the same run."""

import timeit

import pytest
import torch
import torch.nn.functional as F

from fastdit import ops

X, T = torch.randn(1, 2, 8), torch.randn(1, 8)


def _us(call, number=4000):
    call()
    return min(timeit.repeat(call, number=number, repeat=7)) / number * 1e6


@pytest.mark.parametrize("grad, bar", [(False, 6.0), (True, 15.0)])
def test_norm_modulate(grad, bar):
    x = X.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        ours = _us(lambda: ops.norm_modulate(x, shift=T, scale=T))
    empty = _us(lambda: torch.empty(X.shape, dtype=X.dtype))
    layer_norm = _us(lambda: F.layer_norm(x, (8,)))
    # the bar is in us of a machine where F.layer_norm without grad costs 3; a slower one scales it
    scale = max(1.0, _us(lambda: F.layer_norm(X, (8,))) / 3.0)
    print(
        f"\nnorm_modulate {ours:.1f} us, allocation {empty:.1f}, F.layer_norm {layer_norm:.1f}, bar {bar * scale:.1f}"
    )
    assert ours - empty <= bar * scale
