"""Gradients of a reference formula by recomputing it under autograd, callable from inside a torch op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_C = torch._C


def _autograd_guard():
    # Inside a torch op autograd's dispatch keys are excluded; the recomputation needs them back.
    exclude = _C._dispatch_tls_local_exclude_set()
    for key in (
        _C.DispatchKey.AutogradFunctionality,
        _C.DispatchKey.AutogradOther,
        _C.DispatchKey.AutogradNestedTensor,
        _C.DispatchKey.ADInplaceOrView,
    ):
        exclude = exclude.remove(key)
    return _C._ForceDispatchKeyGuard(_C._dispatch_tls_local_include_set(), exclude)


def vjp(forward: Callable, wrt: Sequence[int], outputs: int = 1, saved: int = 0) -> Callable:
    """The `Impl.backward` of a differentiable `forward(*args)`; wrt: positions of the differentiable arguments."""

    def backward(*flat):
        needs = flat[-1]
        grads, args = flat[:outputs], list(flat[outputs : len(flat) - 1 - saved])
        wanted = [i for i, need in zip(wrt, needs, strict=True) if need and args[i] is not None]
        with _autograd_guard(), torch.enable_grad():
            for i in wanted:
                args[i] = args[i].detach().requires_grad_()
            out = forward(*args)
            out = out if isinstance(out, tuple) else (out,)
            pairs = [(o, g) for o, g in zip(out, grads, strict=True) if g is not None and o.requires_grad]
            found: dict[int, Tensor | None] = {}
            if wanted and pairs:
                given = torch.autograd.grad(
                    [o for o, _ in pairs], [args[i] for i in wanted], [g for _, g in pairs], allow_unused=True
                )
                found = dict(zip(wanted, given, strict=True))
        return tuple(
            None if i not in wanted else found[i] if found.get(i) is not None else torch.zeros_like(args[i])
            for i in wrt
        )

    return backward
