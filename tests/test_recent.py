"""`recent`: the last calls are known again by a guard of their tensors, and none is taken for another."""

import gc
import weakref

import pytest
import torch

from fastdit.backends import _facts


def _given():
    return torch.randn(2, 3, 8), torch.nn.Parameter(torch.randn(8)), None, 1e-6, "layer", (1, 2)


def _with(i, value):
    given = list(_given())
    given[i] = value
    return tuple(given)


SETTINGS = ("triton", True, False)
OTHERS = {
    "shape": _with(0, torch.randn(2, 4, 8)),
    "dims": _with(0, torch.randn(6, 8)),
    "strides": _with(0, torch.randn(2, 8, 3).transpose(1, 2)),
    "every-other-row": _with(0, torch.randn(4, 3, 8)[::2]),
    "dtype": _with(0, torch.randn(2, 3, 8).double()),
    "device": _with(0, torch.randn(2, 3, 8, device="meta")),
    "gradient": _with(0, torch.randn(2, 3, 8, requires_grad=True)),
    "conjugate": _with(0, torch.randn(2, 3, 8, dtype=torch.complex64).conj()),
    "parameter": _with(1, torch.randn(8).requires_grad_()),
    "frozen": _with(1, torch.nn.Parameter(torch.randn(8), requires_grad=False)),
    "no-tensor": _with(0, None),
    "one-more-tensor": _with(2, torch.randn(8)),
    "number": _with(3, 1e-5),
    "word": _with(4, "rms"),
    "tuple": _with(5, (1, 3)),
    "list": _with(5, [1, 2]),
    "int-for-float": _with(3, 1),
    "fewer": _given()[:5],
    "more": (*_given(), None),
}


@pytest.fixture
def calls():
    return [(*_facts.as_recent(_given(), *SETTINGS), "known")]


def test_a_recent_call_is_known_again(calls):
    for eps in (1e-6, float("1e-6")):
        assert _facts.recent(calls, _with(3, eps), *SETTINGS) is calls[0]
    assert _facts.recent([], _given(), *SETTINGS) is None


@pytest.mark.parametrize("other", OTHERS)
def test_another_call_is_not_taken_for_it(calls, other):
    assert _facts.recent(calls, OTHERS[other], *SETTINGS) is None


@pytest.mark.parametrize(
    "settings", [("cpu", True, False), ("triton", False, False), ("triton", True, True), ("triton",)], ids=str
)
def test_settings_are_of_the_call(calls, settings):
    assert _facts.recent(calls, _given(), *settings) is None


def test_autocast_and_inference_are_of_the_call(calls):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _facts.recent(calls, _given(), *SETTINGS) is None
    with torch.inference_mode():
        assert _facts.recent(calls, _given(), *SETTINGS) is None


def test_one_tensor_twice_is_never_recent(calls):
    x = torch.randn(4)
    assert _facts.as_recent((x, x)) is None
    both = [(*_facts.as_recent((x, x.clone())),)]
    assert _facts.recent(both, (x, x)) is None and _facts.recent(both, (x.clone(), x)) is both[0]


def test_a_call_that_is_known_again_moves_up(calls):
    second = (*_facts.as_recent(_with(3, 1.0), *SETTINGS), "second")
    calls.append(second)
    assert _facts.recent(calls, _with(3, 1.0), *SETTINGS) is second
    assert calls[0] is second and len(calls) == 2


def test_recent_keeps_no_tensor_alive():
    given = _given()
    alive = weakref.ref(given[0])
    call = _facts.as_recent(given, *SETTINGS)
    del given
    gc.collect()
    assert alive() is None and call


def test_what_cannot_be_compared_is_another_call():
    pair = (torch.randn(2), torch.randn(2))
    one = [(*_facts.as_recent((torch.randn(3), pair)),)]
    assert _facts.recent(one, (torch.randn(3), (pair[0].clone(), pair[1])), *()) is None
    with pytest.raises(TypeError, match="expected a list"):
        _facts.recent((), ())
