"""An op knows a call again by its facts (ops/_known.py): what else a call depends on is asked every time."""

import pytest
import torch

import fastdit
from fastdit import ops
from fastdit.backends import _facts
from fastdit.ops import _known, _op, modulation


@pytest.fixture(autouse=True)
def nothing_known():
    _facts.forget()
    yield
    _facts.forget()


def _randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_one_tensor_for_two_arguments_is_no_rule():
    """The first call passes one tensor thrice; the next one, with the same facts, three."""
    q, k, v = torch.randn(3, 1, 5, 2, 8)
    for args in ((q, q, q), (q, k, v), (k, q, k)):
        assert torch.allclose(ops.attention(*args), ops.attention(*args, backend="reference"), atol=1e-6)


def test_bounds_serve_queries_and_keys():
    q, k, v = torch.randn(3, 6, 2, 8)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    for _ in range(3):
        own = ops.attention_varlen(q, k, v, cu_seqlens_q=cu, max_seqlen_q=4)
        both = ops.attention_varlen(
            q, k, v, cu_seqlens_q=cu, max_seqlen_q=4, cu_seqlens_k=cu.clone(), max_seqlen_k=4
        )  # fmt: skip
        assert torch.equal(own, both)


def test_wrong_arguments_are_refused_every_time():
    x, shift = _randn(2, 4, 8), _randn(2, 8)
    for _ in range(3):
        ops.norm_modulate(x, shift=shift)
        with pytest.raises(ValueError, match="norm_modulate: shift must end in C = 8"):
            ops.norm_modulate(x, shift=shift[:, :7])
        with pytest.raises(ValueError, match="norm_modulate: eps must be finite"):
            ops.norm_modulate(x, shift=shift, eps=float("nan"))
        with pytest.raises(TypeError, match="norm_modulate: x must be a tensor"):
            ops.norm_modulate("x", shift=shift)


def test_index_tensors_are_looked_into_every_time():
    x, table = _randn(5, 8), _randn(3, 8)
    good = torch.tensor([0, 1, 2, 0, 1])
    for _ in range(3):
        ops.norm_modulate(x, shift=table, row_index=good)
        with pytest.raises(ValueError, match=r"row_index is out of range; got values 1\.\.3"):
            ops.norm_modulate(x, shift=table, row_index=good + 1)


def test_the_choice_of_a_backend_is_asked_for_every_time():
    x = _randn(2, 4, 8)
    kernel, formula = (ops.norm_modulate(x, backend=b) for b in ("cpu", "reference"))
    assert not torch.equal(kernel, formula), "the two cannot be told apart"
    for _ in range(3):
        assert torch.equal(ops.norm_modulate(x), kernel)
        with fastdit.use_backend("reference"):
            assert torch.equal(ops.norm_modulate(x), formula) and torch.equal(
                ops.norm_modulate(x, backend="cpu"), kernel
            )
        fastdit.set_backend("reference")
        assert torch.equal(ops.norm_modulate(x), formula)
        fastdit.set_backend(None)


def test_gradients_before_and_after():
    x, shift = _randn(2, 4, 8), _randn(2, 8)
    wanted = torch.autograd.functional.jacobian(lambda s: ops.norm_modulate(x, shift=s, backend="reference"), shift)
    for _ in range(3):
        with torch.no_grad():
            assert not ops.norm_modulate(x, shift=shift.requires_grad_()).requires_grad
        found = torch.autograd.functional.jacobian(lambda s: ops.norm_modulate(x, shift=s), shift)
        assert torch.allclose(found, wanted, atol=1e-6)
        assert not ops.norm_modulate(x, shift=shift.detach()).requires_grad


def test_what_was_left_out_is_filled_in():
    x, weight = _randn(1, 4, 3, 6, 6), _randn(4, 4, 3, 3, 3)
    whole = ops.causal_conv3d(x, weight)
    for _ in range(3):
        assert torch.equal(ops.causal_conv3d(x, weight), whole)
        assert torch.equal(ops.causal_conv3d(x, weight, padding=(2, 0, 1, 1, 1, 1), stride=(1, 1, 1)), whole)
        assert not torch.equal(ops.causal_conv3d(x, weight, padding=(0, 2, 1, 1, 1, 1)), whole)


def test_a_row_that_serves_a_batch():
    """The check makes a tensor of it: such a call is made step by step."""
    x, shift = _randn(2, 4, 8), _randn(1, 8)
    for _ in range(3):
        assert torch.equal(ops.norm_modulate(x, shift=shift), ops.norm_modulate(x, shift=shift.expand(2, 8)))


def test_modes_and_transforms_see_the_op_every_time():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    x = _randn(2, 4, 8)
    for i in range(1, 4):
        ops.norm_modulate(x)
        with Seen():
            ops.norm_modulate(x)
        assert seen.count("fastdit::norm_modulate") == i


def test_known_calls_are_forgotten(monkeypatch):
    monkeypatch.setattr(_facts, "MOST", 4)
    op = ops.modulation._norm_modulate
    assert isinstance(op, _op.Op)
    for n in range(1, 12):
        ops.norm_modulate(_randn(1, n, 8))
        assert 1 <= len(op._known) <= 4
    _facts.forget()
    assert not op._known


def test_a_call_that_came_twice_is_known_without_its_facts(monkeypatch):
    def call():
        return ops.norm_modulate(_randn(2, 4, 8), shift=_randn(2, 8))

    wanted = [call(), call()][0]
    monkeypatch.setattr(_facts, "facts", None)
    assert torch.equal(call(), wanted)
    with pytest.raises(TypeError):
        ops.norm_modulate(_randn(2, 4, 8), shift=_randn(2, 8), eps=1e-5)
    _facts.forget()
    with pytest.raises(TypeError):
        call()


def test_more_calls_in_turn_than_are_recent():
    for _ in range(4):
        for n in range(1, 9):
            x = _randn(2, n, 8)
            assert torch.equal(ops.norm_modulate(x), ops.norm_modulate(x.clone(), backend="cpu"))
    assert len(modulation._norm_modulate._recent) == _known.RECENT
