"""The activation between the two linear layers of an MLP, plain or gated."""

from __future__ import annotations

from torch import Tensor

from ..reference.activation import ACTS
from . import _check
from ._op import Op


def _tensor(op: str, what: str, t: Tensor) -> None:
    _check.floating(op, what, t)
    if t.dim() == 0 or t.shape[-1] == 0:
        raise ValueError(f"{op}: {what} has no channels; got {list(t.shape)}, expected [..., C >= 1]; check the width.")
    _check.channels_contiguous(op, what, t)


def _check_activation(x, up, act) -> tuple:
    op = "activation"
    _tensor(op, "x", x)
    _check.choice(op, "act", act, ACTS)
    if up is not None:
        _tensor(op, "up", up)
        if up.shape != x.shape or up.dtype != x.dtype:
            raise ValueError(
                f"{op}: x and up are two halves of one projection; got {list(x.shape)} {_check.name(x.dtype)} and "
                f"{list(up.shape)} {_check.name(up.dtype)}, expected the same; check the chunk."
            )
        _check.same_device(op, "up", up, x)
    return x, up, act


_activation = Op(
    "activation",
    "(Tensor x, Tensor? up, str act) -> Tensor",
    differentiable=("x", "up"),
    fake=lambda x, *_: x.new_empty(x.shape),
    check=_check_activation,
)


def activation(x: Tensor, act: str = "gelu_tanh", *, up: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Activation of an MLP, or of the gate half of a gated one (GEGLU, SwiGLU).

        y = act(x) * up,   gelu: x Phi(x),  gelu_tanh: x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3))),
                           silu: x / (1 + exp(-x)),  relu: max(x, 0)

    Args:
        x (Tensor[..., C]; f32, bf16, f16, f64): output of the first linear layer, or its gate half. A view such as
            `h.chunk(2, dim=-1)` is read in place.
        act (str): "gelu_tanh" (DiT, Wan, Flux, HunyuanVideo, SD3), "gelu", "silu", "relu".
        up (Tensor like x, optional): the other half of a gated MLP.
        backend (str, optional): "cuda", "triton", "cpu", "reference". Default: best available.
    Returns:
        Tensor[..., C], contiguous, dtype of x; math in fp32 (f64: f64), one rounding. Gradients for x and up.
    Raises:
        ValueError: shapes, strides, devices, act.   TypeError: dtypes.   NoBackend: forced backend cannot run.
    Cost:   2*x.numel()*itemsize bytes (3 with up; backward 3 and 5) and about 25 FLOPs an element; memory-bound.
    Source: arXiv 1606.08415, 2002.05202; diffusers models/activations.py GELU, GEGLU, SwiGLU.
    """
    return _activation(backend, x, up, act)
