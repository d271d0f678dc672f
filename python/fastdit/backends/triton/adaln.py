"""adaln on the Triton kernels: the GEMMs of a block with norm, activation, heads or gate folded in.

With E = tokens * C * itemsize, bytes to and from memory of one half of a block (weights apart), and launches:

    attention   norm 2E, GEMM 4E, qk norm and rope 4E, attention 4E, GEMM 2E, gate 3E   19E in 6 launches
                fused: 4E, 4E, 3E                                                       11E in 3
    mlp (4C)    norm 2E, GEMM 5E, activation 8E, GEMM 5E, gate 3E                       23E in 5
                fused: 5E, 6E                                                           11E in 2

(eager PyTorch: 9 launches and more without qk norm and rope, 20 with them; 7 for the mlp.) What it costs: every column
tile takes the row statistics and modulates its rows again, F / BN times C reads (L2) and some 8 operations an element;
and the GEMM is Triton's, not the vendor's. So a call is fused where launches and traffic decide, up to ROWS tokens of
at most CHANNELS channels in 16 bits: DiT-S to XL at 256 and 1,024 tokens and small batches. Not yet run on a GPU; a
line "adaln|dtype,C" of the device's table moves that bound.
"""

from __future__ import annotations

import torch

from fastdit.kernels.adaln import linear_gate_residual as _gate_kernel, norm_modulate_linear as _project_kernel

from ..registry import Impl, register as _register
from . import adaln_backward as _backward
from ._config import Config, choose, tunable
from ._launch import dot_precision, launch, unfit
from ._tiles import alignment

ROWS, CHANNELS = 2048, 1536
_BUCKETS = (512, 2048, 8192)
_HALF = (
    Config((128, 128, 64), 8, 3), Config((64, 128, 64), 4, 3), Config((64, 64, 64), 4, 4), Config((64, 64, 128), 4, 3),
    Config((64, 256, 64), 8, 2), Config((128, 128, 32), 8, 4), Config((128, 64, 64), 4, 3),
)  # fmt: skip
_WIDE = Config((64, 64, 32), 4, 2)
tunable("norm_modulate_linear", *_HALF, _WIDE)
tunable("linear_gate_residual", *_HALF, _WIDE)


def _config(kernel, x, rows, K, F):
    """The largest tile that still gives most multiprocessors one; token counts matter by their order only."""
    bound = next((b for b in _BUCKETS if rows <= b), 2 * _BUCKETS[-1])

    def default(_arch):
        if x.dtype == torch.float32:
            return _WIDE
        for tile in _HALF[:2]:
            if -(-bound // tile.blocks[0]) * -(-F // tile.blocks[1]) >= 100:
                return tile
        return _HALF[2] if K <= 2048 else _HALF[3]  # a long K in half as many steps

    return choose(kernel, x, (x.dtype, K, F, bound), default)


def _rows(x):
    """(rows, tokens of a sample, stride of samples, stride of tokens)."""
    if x.dim() == 3:
        batch, tokens = x.shape[:2]
        return batch * tokens, tokens, x.stride(0), x.stride(1)
    return x.shape[0], x.shape[0], 0, x.stride(0)


def _table(t, tokens, indexed):
    """(stride of samples, stride of rows, tokens that share a row)."""
    if t is None:
        return 0, 0, 1
    if indexed:
        return t.stride(0), 0, 1
    if t.dim() == 3:
        return t.stride(0), t.stride(1), tokens // t.shape[1]
    return t.stride(0), 0, tokens


def _groups(rows, pers, indexed, BM):
    """(rows of a group, whether tiles keep inside one and so share their table rows)."""
    if not pers or indexed:
        return rows, not pers
    group = min(pers)
    whole = group % BM == 0 or group >= 4 * BM  # else the last tile of each group would idle too much
    if whole and all(per % group == 0 for per in pers):
        return group, True
    return rows, False


def norm_modulate_linear(
    x, shift, scale, norm_weight, norm_bias, row_index, weight, bias, norm, eps, weight_offset, act, precision, keep
):
    return _project(
        x, shift, scale, norm_weight, norm_bias, row_index, weight, bias, (None,) * 6, act, (0, 0, 0), norm, eps,
        weight_offset, None, 0.0, "interleaved", 0, 0, precision, weight.shape[0] if keep else 0,
    )  # fmt: skip


def norm_modulate_qkv(
    x, shift, scale, norm_weight, norm_bias, row_index, weight, bias, q_weight, k_weight, q_bias, k_bias, cos, sin,
    heads, kv_heads, norm, eps, weight_offset, qk_norm, qk_eps, layout, rope_start, rope_len, precision, keep,
):  # fmt: skip
    D = weight.shape[0] // (heads + 2 * kv_heads)
    kept = (heads + kv_heads) * D if keep else 0
    if qk_norm is None and cos is None and not keep:
        D = 0  # heads do not matter: whole tiles of columns
    if rope_len is None:
        rope_len = x.shape[-2] - rope_start
    return _project(
        x, shift, scale, norm_weight, norm_bias, row_index, weight, bias,
        (q_weight, k_weight, q_bias, k_bias, cos, sin), None, (heads, kv_heads, D), norm, eps, weight_offset, qk_norm,
        qk_eps, layout, rope_start, rope_len, precision, kept,
    )  # fmt: skip


def _project(
    x, shift, scale, norm_weight, norm_bias, index, weight, bias, vectors, act, shape, norm, eps, weight_offset,
    qk_norm, qk_eps, layout, rope_start, rope_len, precision, kept_width,
):  # fmt: skip
    F, C = weight.shape
    H, HKV, D = shape
    y = x.new_empty(*x.shape[:-1], F)
    kept = x.new_empty(*x.shape[:-1], kept_width) if kept_width else x.new_empty(0)
    if y.numel() == 0:
        return y, kept
    rows, tokens, x_b, x_n = _rows(x)
    BM, BN, BK = (config := _config("norm_modulate_linear", x, rows, C, F)).blocks
    R = step = 0
    warps, stages, tiles = config.warps, config.stages, -(-F // BN)
    if D:
        while BN < D or (BN < 256 and 10 * (BN // D * D) < 7 * BN):
            BN *= 2  # heads of 72: one fills 0.56 of 128 columns, three 0.84 of 256
        if BN >= 256:
            BM, warps, stages = min(BM, 64), 8, 2
        tiles = -(-(H + 2 * HKV) // (BN // D))
    cos, sin = vectors[4:]
    cos_strides, cos_align = (0, 0, 0), 1
    if cos is None:
        layout = "interleaved"
    else:
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        R, step = 2 * cos.shape[-1], cos.stride(-1)
        cos_strides = _rope_strides(cos)
        cos_align = alignment(4, *cos_strides)
    indexed = index is not None
    shift_row, scale_row = _table(shift, tokens, indexed), _table(scale, tokens, indexed)
    pers = [row[2] for t, row in ((shift, shift_row), (scale, scale_row)) if t is not None]
    group, uniform = _groups(rows, pers, indexed, BM)
    if not uniform:
        stages = 2  # tiles of tables wait in shared memory beside those of x and W
    w_n = weight.stride(0)
    launch(
        _project_kernel,
        (-(-group // BM) * (rows // group) * tiles, 1, 1),
        (
            y, kept if kept_width else None, x, weight, bias, shift, scale, norm_weight, norm_bias,
            index.contiguous() if indexed else None, *vectors[:4], cos, sin,
        ),
        (
            rows, tokens, group, x_b, x_n, w_n, *shift_row, *scale_row, *cos_strides, rope_start, rope_len,
            eps, weight_offset, qk_eps,
        ),
        (
            C, F, norm == "layer", precision == "native", uniform, act, H, HKV, D, qk_norm, layout, R, step,
            cos is not None and precision == "native" and cos.dtype == x.dtype,
            alignment(x.itemsize, x_b, x_n, w_n, *shift_row[:2], *scale_row[:2]), cos_align, dot_precision(),
            BM, BN, BK, stages,
        ),
        warps, stages,
    )  # fmt: skip
    return y, kept


def _rope_strides(cos):
    """(sample, token, head) strides of a table that may leave out or broadcast any of them."""
    strides = [0 if size == 1 else stride for size, stride in zip(cos.shape[:-1], cos.stride(), strict=False)]
    if len(strides) == 1:
        return 0, strides[0], 0
    return (0, *strides) if len(strides) == 2 else tuple(strides)


def linear_gate_residual(residual, y, weight, bias, gate, index, gate_act, precision, keep):
    C, K = weight.shape
    out = residual.new_empty(residual.shape)
    kept = y.new_empty(residual.shape) if keep else y.new_empty(0)
    if out.numel() == 0:
        return out, kept
    rows, tokens, r_b, r_n = _rows(residual)
    _, _, a_b, a_n = _rows(y)
    BM, BN, BK = (config := _config("linear_gate_residual", y, rows, K, C)).blocks
    indexed = index is not None
    gate_row = _table(gate, tokens, indexed)
    group, uniform = _groups(rows, () if gate is None else (gate_row[2],), indexed, BM)
    w_n = weight.stride(0)
    launch(
        _gate_kernel,
        (-(-group // BM) * (rows // group) * -(-C // BN), 1, 1),
        (out, kept if keep else None, residual, y, weight, bias, gate, index.contiguous() if indexed else None),
        (rows, tokens, group, r_b, r_n, a_b, a_n, w_n, *gate_row),
        (
            K, C, gate_act, precision == "native", uniform,
            alignment(y.itemsize, r_b, r_n, a_b, a_n, w_n, *gate_row[:2]), dot_precision(), BM, BN, BK,
        ),
        config.warps, config.stages,
    )  # fmt: skip
    return out, kept


# ---- what the kernels take, and where auto takes them ---------------------------------------------------
def _supports(x, weight, bias):
    reason = unfit(x)
    if reason is None:
        for what, t in (("weight", weight), ("bias", bias)):
            if t is not None and t.dtype != x.dtype:
                return f"the projection's {what} must have x's dtype; got {t.dtype} beside {x.dtype}"
            if t is not None and t.stride(-1) != 1:
                return f"the projection's {what} must be contiguous along its last dim"
    return reason


def _supports_linear(x, shift, scale, norm_weight, norm_bias, row_index, weight, bias, *_):
    return _supports(x, weight, bias)


def _supports_qkv(x, *args):
    weight, bias = args[5:7]
    D = weight.shape[0] // (args[13] + 2 * args[14])
    if D > 256 or D % 2:
        return f"heads must be even and at most 256 wide; got {D}"
    return _supports(x, weight, bias)


def _supports_gate(residual, y, weight, bias, *_):
    return _supports(y, weight, bias)


def _bound(x):
    """Rows up to which a call is fused."""
    C = x.shape[-1]
    default = 0 if x.dtype == torch.float32 or C > CHANNELS else ROWS
    return choose("adaln", x, (x.dtype, C), lambda _: Config((default,))).blocks[0]


@torch.compiler.assume_constant_result
def _bound_of(dtype, C, device):
    """The same for a tensor that is being traced: a table is read, which a graph cannot hold."""
    return _bound(torch.empty(0, C, dtype=dtype, device=device))


def _pays(x, *_):
    bound = _bound_of(x.dtype, x.shape[-1], x.device) if torch.compiler.is_compiling() else _bound(x)
    rows = x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]
    if rows > bound:
        return f"the vendor's GEMM between fused kernels above {bound} tokens of {x.shape[-1]} channels in {x.dtype}"
    return None


def register() -> None:
    for forward, backward, supports, pays in (
        (norm_modulate_linear, _backward.norm_modulate_linear, _supports_linear, _pays),
        (norm_modulate_qkv, _backward.norm_modulate_qkv, _supports_qkv, _pays),
        (linear_gate_residual, _backward.linear_gate_residual, _supports_gate, None),
    ):
        _register(Impl(forward.__name__, "triton", supports, forward, backward, pays=pays))
