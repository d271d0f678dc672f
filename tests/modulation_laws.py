"""The laws of modulation beside the contract on its samples, for the tests of every compiled backend, and row maps.

A law takes the backend and the device of its tensors first.
"""

import torch
from laws import rows

from fastdit import ops
from fastdit.testing import contract
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample

EMPTY = ((0, 4, 8), (2, 0, 8), (0, 8))


def seam(
    B, N, C, *, gate=None, shift=None, scale=None, index=None, gate_index=None, affine=False, strided=False, **rest
):
    """A seam with tables of these leading dims. index: the row of each token; strided: slices of wider tensors."""

    def make(m: Maker):
        def table(*lead):
            wide = m.randn(*lead, 2 * C + 8)
            return wide[..., C : 2 * C] if strided else wide[..., :C].contiguous()

        def tokens():
            return (m.randn(B, N + 1, 2 * C)[:, 1:, :C] if strided else m.randn(B, N, C)) if B else m.randn(N, C)

        def listed(values):
            return None if values is None else torch.as_tensor(values, device=m.device).view(*(B, N) if B else (N,))

        tables = {k: table(*lead) for k, lead in (("shift", shift), ("scale", scale)) if lead}
        if affine:
            tables |= dict(weight=m.randn(C), bias=m.randn(C))
        kwargs = tables | dict(row_index=listed(index), gate_row_index=listed(gate_index))
        return (tokens(), tokens(), table(*gate) if gate else None), kwargs | rest

    return Sample("gate_residual_norm_modulate", "own", make)


# 4 processors are pretended where there is no GPU: 8 programs, so these walk long runs and several short ones.
MAPS = {
    "long-runs": seam(2, 70, 40, gate=(2,), shift=(2,), scale=(2,)),
    "one-row": seam(2, 70, 40, gate=(1,), shift=(1,), scale=(1,)),
    "packed-one-row": seam(0, 90, 40, gate=(1,), shift=(1,), scale=(1,), affine=True),
    "many-frames": seam(2, 48, 40, gate=(2, 12), shift=(2, 12), scale=(2, 12), affine=True),
    "frames-in-samples": seam(2, 48, 40, gate=(2,), shift=(2, 12), scale=(2, 4)),
    "rows-that-do-not-nest": seam(2, 48, 40, gate=(2, 16), shift=(2, 12), scale=(2, 4)),
    "per-token": seam(2, 36, 40, gate=(2, 36), shift=(2, 36), scale=(2, 36)),
    "per-token-in-samples": seam(2, 36, 40, gate=(2,), shift=(2, 36), scale=(2, 36), affine=True),
    "single-tokens": seam(9, 1, 40, gate=(9,), shift=(9,), scale=(9,)),
    "no-tables": seam(2, 36, 40, affine=True),
    "segments": seam(0, 60, 40, gate=(4,), shift=(4,), scale=(4,), index=[0] * 7 + [1] + [3] * 52),
    "scattered": seam(
        2, 30, 40, gate=(9,), shift=(7,), scale=(9,), index=[(i * i) % 7 for i in range(60)], affine=True
    ),
    "two-indices": seam(
        0, 60, 40, gate=(4,), shift=(5,), scale=(5,), index=[i % 5 for i in range(60)],
        gate_index=[i // 20 for i in range(60)],
    ),
    "gate-index": seam(2, 30, 40, gate=(4,), shift=(2, 3), scale=(2,), gate_index=[i % 3 for i in range(60)]),
}  # fmt: skip


def results(backend, device, sample: Sample, dtype: torch.dtype) -> list:
    """The outputs of a seam and every gradient, in poisoned memory."""
    args, kwargs, leaves = contract._leaves(sample, *sample.make(Maker(dtype, device)))
    with poisoned():
        out = ops.gate_residual_norm_modulate(*args, **kwargs, backend=backend)
        return [*out, *torch.autograd.grad(out, leaves, [torch.cos(o.detach()) for o in out])]


def rows_that_nobody_uses_have_no_gradient(backend, device) -> None:
    x = torch.randn(40, 8, device=device)
    table = torch.randn(5, 8, device=device, requires_grad=True)
    index = torch.tensor([1] * 30 + [3] * 10, device=device)
    with poisoned():
        y = ops.norm_modulate(x, shift=table, row_index=index, backend=backend)
        (grad,) = torch.autograd.grad(y.sum(), table)
    assert (grad[[0, 2, 4]] == 0).all() and (grad[1] == 30).all() and (grad[3] == 10).all()


def alone_and_together(backend, device, wanted: str):
    """A gradient that alone is asked for, and the same beside all others."""
    (r, y, gate), kwargs = MAPS["frames-in-samples"].make(Maker(torch.float32, device))
    kwargs["weight"] = torch.randn(40, device=device)

    def grads(names):
        leaves = dict(x=y, gate=gate, shift=kwargs["shift"], weight=kwargs["weight"])
        leaves = {k: v.clone().requires_grad_(k in names) for k, v in leaves.items()}
        given = kwargs | {k: leaves[k] for k in ("shift", "weight")}
        out = ops.gate_residual_norm_modulate(r, leaves["x"], leaves["gate"], **given, backend=backend)
        with poisoned():
            found = torch.autograd.grad(out, [leaves[k] for k in names], [torch.cos(o) for o in out])
        return dict(zip(names, found, strict=True))

    return grads([wanted])[wanted], grads(["x", "shift", "weight", "gate"])[wanted]


def nan_stays_with_its_token_and_its_row(backend, device) -> None:
    m = Maker(torch.float32, device)
    x = m.randn(40, 40)
    x[7, 3] = float("nan")
    index = torch.tensor([0] * 12 + [1] * 28, device=device)
    table = m.randn(2, 40).requires_grad_()
    x.requires_grad_()
    y = ops.norm_modulate(x, scale=table, shift=m.randn(2, 40), row_index=index, backend=backend)
    grad, d_table = torch.autograd.grad(y, (x, table), m.randn(40, 40))
    others = [i for i in range(40) if i != 7]
    assert y[7].isnan().all() and y[others].isfinite().all() and grad[others].isfinite().all()
    assert d_table[0].isnan().all() and d_table[1].isfinite().all()


def zero_size(backend, device, shape) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    table = torch.randn(1 if len(shape) == 2 else shape[0], 8, device=device, requires_grad=True)
    with poisoned():
        y = ops.norm_modulate(x, shift=table, scale=table, backend=backend)
        r, h = ops.gate_residual_norm_modulate(x, x, table, shift=table, backend=backend)
        grads = torch.autograd.grad((y + r + h).sum(), (x, table))
    assert y.shape == r.shape == h.shape == grads[0].shape == shape and (grads[1] == 0).all()


EVERYWHERE = [
    *rows(rows_that_nobody_uses_have_no_gradient),
    *rows(nan_stays_with_its_token_and_its_row),
    *rows(zero_size, EMPTY),
]
