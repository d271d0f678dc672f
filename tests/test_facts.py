"""`kept`: what follows from the facts of a call is found once, and never for other facts."""

import gc
import weakref

import pytest
import torch

from fastdit.backends import _facts
from fastdit.backends._facts import kept


@pytest.fixture
def asked():
    """A kept function and the calls that reached it."""
    calls = []

    @kept
    def make(*args):
        calls.append(args)
        return len(calls)

    return make, calls


X = torch.zeros(4, 6)
OTHERS = {
    "shape": torch.zeros(4, 6)[:2],
    "strides": torch.zeros(6, 4).t(),
    "dtype": torch.zeros(4, 6, dtype=torch.bfloat16),
    "device": torch.zeros(4, 6, device="meta"),
    "none": None,
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_facts_are_asked_for(asked, other):
    make, calls = asked
    assert make(X, 1) == make(X.clone(), 1) == make(torch.nn.Parameter(X), 1) == 1
    assert make(X, OTHERS[other]) == make(X, OTHERS[other]) == 2
    assert make(OTHERS[other], 1) == 3 and make(X, 1) == 1
    assert make(X, "rms") == 4 and make(X, (1, 2)) == 5 and make(X) == 6 and len(calls) == 6


@pytest.mark.parametrize("unkept", [[1, 2], (1, [2]), torch.nn.Linear(1, 1)], ids=["list", "nested", "object"])
def test_what_has_no_facts_is_asked_for_again(asked, unkept):
    make, calls = asked
    make(X, unkept)
    make(X, unkept)
    assert len(calls) == 2


def test_subclasses_are_asked_for_again(asked):
    class Other(torch.Tensor):
        pass

    make, calls = asked
    make(X.as_subclass(Other))
    make(X.as_subclass(Other))
    assert len(calls) == 2


def test_errors_are_raised_anew():
    calls = []

    @kept
    def refuse(x):
        calls.append(x.shape)
        raise TypeError("bad")  # which is also what a key without facts raises

    for _ in range(2):
        with pytest.raises(TypeError, match="bad"):
            refuse(X)
    assert len(calls) == 2


def test_no_tensor_is_kept_alive():
    make = kept(lambda x: tuple(x.shape))
    x = torch.zeros(3, 5)
    alive = weakref.ref(x)
    assert make(x) == (3, 5)
    del x
    gc.collect()
    assert alive() is None


def test_kept_facts_are_bounded(asked, monkeypatch):
    monkeypatch.setattr(_facts, "MOST", 8)
    make, _ = asked
    for n in range(100):
        assert make(X, n) == n + 1
        assert len(_facts._all[-1]) <= 8
    assert make(X, 99) == 100 and make(X, 0) == 101  # the last is there, the first went


def test_forget(asked):
    make, calls = asked
    make(X)
    _facts.forget()
    make(X)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "args",
    [
        (X, X.t(), None, 1, 1.5, True, "a", (1, 2), X.shape),
        (torch.nn.Parameter(X), X.expand(3, 4, 6), X.to("meta"), X.bfloat16(), torch.tensor(3)),
        (),
        ([1],),
        (X.to_sparse(),),
        (X, X.to_sparse(), 1),
        (X.as_subclass(type("Other", (torch.Tensor,), {})),),
        (X.shape, X.stride(), True, None),
    ],
    ids=["plain", "tensors", "nothing", "list", "sparse", "sparse-second", "subclass", "looks-like-a-tensor"],
)
def test_compiled_facts_are_those_of_python(args):
    assert _facts.facts is not _facts._facts and _facts.facts(args) == _facts._facts(args)


def test_a_tensor_is_not_what_its_facts_are():
    assert _facts.facts((X, None)) != _facts.facts((*_facts.facts((X,)), None))
