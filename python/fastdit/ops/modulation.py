"""adaLN modulation: norm + shift/scale, gated residual, and the seam of every DiT block that does both.

Tables (shift, scale, gate) are (B, C); (B, M, C) with N % M == 0, one row per N / M consecutive tokens (per sample,
frame or token); or (R, C) with `row_index` of x's row shape. Packed x (N, C) takes (1, C), or (R, C) with row_index.
Tables may be strided views (`temb.chunk(6, dim=-1)`) as long as the channel dim is contiguous.
"""

from __future__ import annotations

from torch import Tensor

from . import modulation_check as check
from ._op import Op

_norm_modulate = Op(
    "norm_modulate",
    "(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, Tensor? row_index, "
    "str norm, float eps, float weight_offset, str precision) -> Tensor",
    differentiable=("x", "shift", "scale", "weight", "bias"),
    fake=lambda x, *_: x.new_empty(x.shape),
    check=check.norm_modulate,
    validate=lambda x, shift, scale, w, b, index, *_: check.validate_rows(
        "norm_modulate", index, "row_index", shift, scale
    ),
)
_gate_residual = Op(
    "gate_residual",
    "(Tensor residual, Tensor y, Tensor? gate, Tensor? post_norm_weight, Tensor? row_index, "
    "str? gate_act, str? post_norm, float post_norm_eps, str precision) -> Tensor",
    differentiable=("residual", "y", "gate", "post_norm_weight"),
    fake=lambda residual, *_: residual.new_empty(residual.shape),
    check=check.gate_residual,
    validate=check.validate_gate_residual,
)


_gate_residual_norm_modulate = Op(
    "gate_residual_norm_modulate",
    "(Tensor residual, Tensor y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, "
    "Tensor? post_norm_weight, Tensor? gate_row_index, Tensor? row_index, str norm, float eps, float weight_offset, "
    "str? gate_act, str? post_norm, float post_norm_eps, str precision) -> (Tensor, Tensor)",
    differentiable=("residual", "y", "gate", "shift", "scale", "weight", "bias", "post_norm_weight"),
    fake=lambda residual, y, *_: (residual.new_empty(residual.shape), y.new_empty(y.shape)),
    check=check.seam,
    validate=check.validate_seam,
)


def norm_modulate(
    x: Tensor,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    norm: str = "layer",
    eps: float = 1e-6,
    row_index: Tensor | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Normalise each token, then modulate it by its row of shift and scale.

        y = n(x) * (1 + scale) + shift,   n(x) = (x - mean) * rsqrt(var + eps) * (weight_offset + weight) + bias

    Args:
        x (Tensor[B, N, C] or packed [N, C]; f32, bf16, f16, f64): tokens; channel dim contiguous.
        shift, scale (Tensor[B, C], [B, M, C], or [R, C] with row_index): see the module; None leaves the term out.
        weight, bias (Tensor[C]): affine part of the norm; weight_offset (float): 1.0 for zero-centred weights (Krea).
        norm (str): "layer" (biased variance) or "rms" (no mean, no variance shift). eps (float): added to the variance.
        row_index (Tensor[B, N] or [N]; int32, int64): row of the (R, C) tables for each token.
        precision (str): "fp32" rounds once at the end (Wan's law); "native" rounds to x.dtype after each operation, as
            eager code does (DiT, Flux, HunyuanVideo), and then needs one dtype.
        backend (str, optional): "cuda", "triton", "cpu", "reference". Default: best available.
    Returns:
        Tensor like x, contiguous, dtype of x. Gradients for x, shift, scale, weight and bias.
    Raises:
        ValueError: shapes, strides, devices, indices, eps.   TypeError: dtypes.   NoBackend: nothing can run it.
    Cost:   2*N*C*itemsize bytes and about 8*N*C FLOPs a sample, backward 3*N*C*itemsize; memory-bound.
    Source: arXiv 2212.09748; facebookresearch/DiT models.py `modulate`; diffusers AdaLayerNormZero, Wan, LTX, Mochi.
    """
    return _norm_modulate(backend, x, shift, scale, weight, bias, row_index, norm, eps, weight_offset, precision)


def gate_residual(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    gate_act: str | None = None,
    post_norm: str | None = None,
    post_norm_weight: Tensor | None = None,
    post_norm_eps: float = 1e-6,
    row_index: Tensor | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Add a branch to the residual stream through its gate.

        r = residual + act(gate) * [rms](y)

    Args:
        residual, y (Tensor[B, N, C] or [N, C]): residual has y's dtype or is float32 (a wide residual stream).
        gate (Tensor[B, C], [B, M, C], or [R, C] with row_index): None is a plain residual add.
        gate_act (str, optional): "tanh" (Mochi, Z-Image). post_norm (str, optional): "rms" of y, with
            post_norm_weight (Tensor[C]) and post_norm_eps.
        row_index, precision, backend: as in `norm_modulate`.
    Returns:
        Tensor like residual, contiguous. Gradients for residual, y, gate and post_norm_weight.
    Raises:
        ValueError, TypeError, NoBackend: as in `norm_modulate`.
    Cost:   3*N*C*itemsize bytes a sample, backward 4; memory-bound.
    Source: DiT models.py `x + gate * attn(...)`; diffusers MochiModulatedRMSNorm and its tanh gate.
    """
    return _gate_residual(
        backend, residual, y, gate, post_norm_weight, row_index, gate_act, post_norm, post_norm_eps, precision
    )


def gate_residual_norm_modulate(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    norm: str = "layer",
    eps: float = 1e-6,
    gate_act: str | None = None,
    post_norm: str | None = None,
    post_norm_weight: Tensor | None = None,
    post_norm_eps: float = 1e-6,
    gate_row_index: Tensor | None = None,
    row_index: Tensor | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The seam between two sublayers: close one with its gate, open the next with its norm, in one pass.

        r = residual + act(gate) * [rms](y)
        h = n(r) * (1 + scale) + shift           of r as stored, rounded to its dtype, as the models do

    Args:
        All of `gate_residual`'s and `norm_modulate`'s. gate_row_index: rows of the gate where they differ from
        row_index, which serves both when gate_row_index is None.
    Returns:
        (r, h): r like residual, h with y's dtype, both contiguous.
    Raises:
        ValueError, TypeError, NoBackend: as in `norm_modulate`.
    Cost:   4*N*C*itemsize bytes a sample, against 5 for the two ops, backward 6; memory-bound.
    Source: DiT block, diffusers BasicTransformerBlock (ada_norm_zero), Wan block.
    """
    return _gate_residual_norm_modulate(
        backend, residual, y, gate, shift, scale, weight, bias, post_norm_weight, gate_row_index, row_index,
        norm, eps, weight_offset, gate_act, post_norm, post_norm_eps, precision,
    )  # fmt: skip
