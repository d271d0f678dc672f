"""Backward of the conv family on the CPU kernels.

The input's gradient is the forward kernel over the output's gradient, with transposed, flipped weights: a stride in T
or H makes frames and rows that do not exist, which it skips; a stride in W makes one convolution per phase, each with
its share of the taps. The backward of norm and SiLU then runs over that gradient in place.
"""

from __future__ import annotations

from math import gcd

import torch

from ... import _cpu
from ...reference.conv import NORM_EPS
from .._video import asked, empty, input_gradients, zeros_or_none
from . import conv
from ._abi import DTYPE, pointer

_NONE = (0, 0, 0, 0, 0)


def causal_conv3d_backward(
    grad, x, weight, bias, cache, norm_weight, residual,
    stride, dilation, padding, time_pad, space_pad, norm, norm_eps, act, algo, needs,
):  # fmt: skip
    tensors = (x, weight, bias, cache, norm_weight, residual)
    need_x, need_weight, need_bias, need_cache, need_norm, need_residual = asked(tensors, needs)
    if grad is None or grad.numel() == 0:
        return zeros_or_none(tensors, needs)
    pixels = x.shape[3] * x.shape[4]
    winograd = conv.winograd_code(algo, x.dtype, weight.shape, stride, dilation, pixels)
    shared = conv._geometry(
        x, weight, norm_weight, stride, dilation, padding, time_pad, space_pad, norm, norm_eps, act, winograd
    )
    d_weight, d_bias = _shared_gradients(shared, grad, x, weight, bias, cache, norm_weight, need_weight, need_bias)

    d_x = d_cache = d_norm = None
    if need_x or need_cache or need_norm:
        sums = torch.zeros(x.shape[1], dtype=torch.float64) if need_norm else None

        def prologue(t, given, out):
            _cpu.norm_silu_backward(
                t.data_ptr(), pointer(norm_weight), 0, given.data_ptr(), pointer(out), pointer(sums), 0, t.shape,
                t.stride(), given.stride(), _NONE if out is None else out.stride(), 1, conv._NORM[norm], norm_eps,
                act == "silu", DTYPE[t.dtype], DTYPE[given.dtype], conv._code(norm_weight), 0, torch.get_num_threads(),
            )  # fmt: skip

        d_x, d_cache = input_gradients(
            grad, x, cache, weight, (need_x, need_cache, need_norm), stride, dilation, padding, time_pad, space_pad,
            _Transposed(grad, weight, stride, dilation, winograd, x.dtype).into,
            None if norm is None and act is None else prologue,
        )  # fmt: skip
        d_norm = None if sums is None else sums.to(norm_weight.dtype)
    return d_x, d_weight, d_bias, d_cache, d_norm, grad if need_residual else None


def _shared_gradients(shared, grad, x, weight, bias, cache, norm_weight, need_weight, need_bias):
    if not (need_weight or need_bias):
        return None, None
    d_weight = empty(weight) if need_weight else None
    sums = torch.empty(weight.shape[0], dtype=torch.float64) if need_bias else None
    _cpu.conv_weight_grad(
        shared, x.data_ptr(), pointer(cache), pointer(norm_weight), grad.data_ptr(), pointer(d_weight), pointer(sums),
        x.shape, grad.shape, 0 if cache is None else cache.shape[2], x.stride(), conv._stride(cache), grad.stride(),
        conv._stride(d_weight), DTYPE[weight.dtype],
    )  # fmt: skip
    return d_weight, None if sums is None else sums.to(bias.dtype)


class _Transposed:
    """The transposed convolution of an output's gradient: any window of the padded input's gradient."""

    def __init__(self, grad, weight, stride, dilation, winograd, dtype) -> None:
        self.grad, self.weight, self.stride, self.dilation = grad, weight, stride, dilation
        self.winograd, self.dtype = winograd, dtype
        self._packed: dict[int, torch.Tensor] = {}

    def into(self, out, offset) -> None:
        """out (B, Cin, ...; x's dtype or its arithmetic's): gradient of the padded input from `offset` (t, h, w) on."""
        if out.numel() == 0:
            return
        grad, weight, step = self.grad, self.weight, self.stride[2]
        kernel = weight.shape[2:]
        pads = [(kernel[i] - 1) * self.dilation[i] - offset[i] for i in range(2)]
        for phase in range(min(step, out.shape[4])):
            view = out[..., phase::step] if step > 1 else out
            first, taps, spread = self._taps((phase + offset[2]) % step)
            if not taps:
                view.zero_()
                continue
            packed = self._pack(first, taps)
            pad = (taps - 1) * spread - (phase + offset[2] - first * self.dilation[2]) // step
            skip = min(max(0, -pad), grad.shape[4])  # columns before the first that any output sees
            shared = (
                (kernel[0], kernel[1], taps), (1, 1, 1), (self.dilation[0], self.dilation[1], spread), self.stride[:2],
                (pads[0], pads[1], max(pad, 0)), 0, 0, 0, 0.0, False, self.winograd, DTYPE[self.dtype], 0,
                torch.get_num_threads(),
            )  # fmt: skip
            _cpu.conv_forward(
                shared, grad.data_ptr() + skip * grad.stride(4) * grad.element_size(), 0, packed.data_ptr(), 0, 0, 0,
                view.data_ptr(), (*grad.shape[:4], grad.shape[4] - skip), view.shape, 0, grad.stride(), _NONE,
                view.stride(), _NONE, 0, True, out.dtype != self.dtype,
            )  # fmt: skip

    def _taps(self, residue: int) -> tuple[int, int, int]:
        """(first, count, distance in pixels of grad) of the taps along W that meet input pixels of this residue."""
        step, d, count = self.stride[2], self.dilation[2], self.weight.shape[4]
        hits = [k for k in range(count) if (k * d - residue) % step == 0]
        return (hits[0] if hits else 0), len(hits), d // gcd(step, d)

    def _pack(self, first: int, taps: int):
        if first not in self._packed:
            w, between = self.weight, self.stride[2] // gcd(self.stride[2], self.dilation[2])
            s = w.stride()
            corner = (w.shape[2] - 1) * s[2] + (w.shape[3] - 1) * s[3] + (first + (taps - 1) * between) * s[4]
            self._packed[first] = conv.pack_strided(
                w, w.data_ptr() + corner * w.element_size(), (w.shape[1], w.shape[0], *w.shape[2:4], taps),
                (s[1], s[0], -s[2], -s[3], -s[4] * between), self.dtype, self.winograd,
            )  # fmt: skip
        return self._packed[first]


def norm_silu_backward(grad, x, weight, bias, norm, groups, eps, needs):
    need_x, need_weight, need_bias = asked((x, weight, bias), needs)
    if grad is None or grad.numel() == 0:
        return zeros_or_none((x, weight, bias), needs)
    d_x = empty(x) if need_x else None
    channels = x.shape[1]
    sums = torch.zeros(2, channels, dtype=torch.float64) if need_weight or need_bias else None
    address = pointer(sums)
    shape = (*x.shape[:2], *[1] * (5 - x.dim()), *x.shape[2:])
    _cpu.norm_silu_backward(
        x.data_ptr(), pointer(weight), pointer(bias), grad.data_ptr(), pointer(d_x),
        address if need_weight else 0, address + 8 * channels if need_bias else 0,
        shape, conv._five(x), conv._five(grad), _NONE if d_x is None else conv._five(d_x), groups, conv._NORM[norm],
        NORM_EPS[norm] if eps is None else eps, True,
        DTYPE[x.dtype], DTYPE[grad.dtype], conv._code(weight), conv._code(bias), torch.get_num_threads(),
    )  # fmt: skip
    d_weight = sums[0].to(weight.dtype) if need_weight and sums is not None else None
    return d_x, d_weight, sums[1].to(bias.dtype) if need_bias and sums is not None else None
