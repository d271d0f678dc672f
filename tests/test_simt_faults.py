"""The fault catalogue: a broken kernel per class of fault, which the simulator names, and sound twins."""

import re

import pytest

from fastdit.testing import simt

sim = pytest.importorskip("fastdit._cuda_sim", reason="the block simulator is not built")

# Words of the report, per broken kernel of csrc/cuda/simt/faults.cu.
EXPECTED = {
    "global past the end": "out of bounds: write of 4 bytes of global memory",
    "global before the beginning": "out of bounds: read of 4 bytes of global memory",
    "misaligned": "misaligned read of 8 bytes",
    "input written": "in a tensor that the kernel may only read",
    "output read": "global memory at .* never written",
    "shared static past the end": "out of bounds: write of 4 bytes of shared memory",
    "shared dynamic past the end": "out of bounds: write of 4 bytes of shared memory",
    "shared never written": "read of shared memory at .* never written",
    "another thread's local memory": "another thread's local memory",
    "read without barrier": "race|never written",
    "overwritten without barrier": "race: (write of shared memory .* has read|read of shared memory .* has written)",
    "two blocks write": "another block of the launch has written",
    "half a warp at a barrier": "warp-divergent|exits while|deadlock",
    "two barriers": "diverging barriers: __syncthreads",
    "deadlock": "deadlock: warp 0 waits at bar.sync",
    "half a warp shuffles": "names (it in its mask|threads that have exited)|deadlock",
    "warp exchange without __syncwarp": "race|never written",
    "counted without atomic": "race: write of global memory",
    "cp.async without wait": "asynchronous copy is under way: a wait is missing",
    "cp.async without barrier": "race|a wait is missing|never written",
    "bulk without wait": "race|a wait is missing|never written|is under way",
    "bulk with the wrong parity": "race|a wait is missing|never written|is under way",
    "bulk with half the bytes": "deadlock|beyond the pending count",
    "bulk never announced": "deadlock",
    "mbarrier not known": "no barrier since thread 0 initialised|no mbarrier was initialised",
    "mbarrier not fenced": "without fence.mbarrier_init",
    "turn not waited for": "race: addition of global memory .* another block of the launch has written",
    "turn given before the store is complete": "race: addition of global memory .* another block .* has written",
    "turn of a later block": "deadlock: warp 0 waits at .*ld.acquire at line .* another block to be 1, which is 0",
    "bulk store of values not fenced": "asynchronous read of shared memory .* without a fence.proxy.async",
    "bulk store after a turn not fenced": "without fence.proxy.async.global",
    "bulk store overwritten before it has read": "race: write of shared memory .* bulk stores of thread 0 has read",
    "peer's mbarrier not known": "no mbarrier was initialised .* of a peer|no barrier since thread 0 .*initialised",
    "peer's mbarrier not fenced": "without fence.mbarrier_init",
    "peer's bytes not expected": "race|never written|is under way|beyond the pending count|deadlock",
    "the same half twice": "race: write .* a peer.s bulk copies|race: write .* bulk copies of mbarrier|is under way",
    "copied for itself alone": "deadlock: warp 0 waits at mbarrier.try_wait",
    "not released at the peer": "race|is under way|ends while bulk copies",
    "released at the peer too early": "race",
    "ends before the peer signals": "nothing says that thread . of block . of the cluster has signalled|has ended",
    "ends before the peer's copy": "ends while bulk copies|has ended|has signalled",
    "ends without its copy": "block 1 of the cluster ends while bulk copies",
}
SOUND = [name for name in sim.faults() if name.startswith("sound/")]
each_schedule = pytest.mark.parametrize("schedule", simt.SCHEDULES)


def test_every_broken_kernel_has_its_words():
    assert set(EXPECTED) == set(sim.faults()) - set(SOUND)


@each_schedule
@pytest.mark.parametrize("name", EXPECTED)
def test_caught(name, schedule):
    for seed in range(5 if schedule == "random" else 1):
        sim.schedule(schedule, seed)
        with pytest.raises(RuntimeError) as caught:
            sim.run_fault(name)
        assert str(caught.value).startswith("fault: block (") and re.search(EXPECTED[name], str(caught.value))


@each_schedule
@pytest.mark.parametrize("name", SOUND)
def test_sound(name, schedule):
    for seed in range(5 if schedule == "random" else 1):
        sim.schedule(schedule, seed)
        sim.run_fault(name)


def test_a_fault_leaves_nothing_behind():
    sim.schedule("eager")
    for name in ("deadlock", "sound/bulk", "half a warp shuffles", "sound/cp.async"):
        if name in SOUND:
            sim.run_fault(name)
        else:
            with pytest.raises(RuntimeError):
                sim.run_fault(name)
