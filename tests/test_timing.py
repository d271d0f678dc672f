"""testing/timing.py: percentiles, the order of interleaving, and the effect of kept memory."""

import subprocess
import sys

import pytest

from fastdit.testing import timing

FAULTS = """
import resource, torch
from fastdit.testing import timing
x = torch.zeros(10_000_000)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        y = x.clone(); del y
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh = faults()
raised = timing.keep_freed_memory(2**27)
faults()
print(raised, fresh, faults())
"""


def test_percentiles():
    taken = timing.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (taken.p20, taken.p50, taken.p80, taken.rounds) == (2.0, 3.5, 5.0, 6) and taken.ms == 3500
    single = timing.Timing.of([2.0])
    assert single.p20 == single.p50 == single.p80 == 2.0


def test_every_call_takes_its_turn():
    order, rounds = [], []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = timing.interleaved(calls, rounds=4, repeats=1, after_round=rounds.append)
    assert order == [*"abc", *"bca", *"cab", *"abc"] and rounds == [1, 2, 3, 4]
    assert all(t.rounds == 4 for t in found.values())


def test_short_calls_are_repeated():
    count = 0

    def call():
        nonlocal count
        count += 1

    timing.interleaved({"call": call}, rounds=2, shortest=1e-4)
    assert count > 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_kept_memory_is_not_faulted_in_again():
    """In a process of its own: the setting holds until the end."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    raised, fresh, kept = done.stdout.split()
    assert raised == "True" and int(fresh) > 20_000 and int(kept) < int(fresh) / 10
