"""The laws of a family as rows of one test: a backend's test file says no more than where they run."""

import itertools
from collections.abc import Callable, Iterable

import pytest


def rows(law: Callable, *axes: Iterable, marks=()) -> list:
    """`law` with every combination of the arguments that follow backend and device."""
    return [
        pytest.param(law, arguments, id="-".join((law.__name__, *map(str, arguments))), marks=marks)
        for arguments in itertools.product(*axes)
    ]
