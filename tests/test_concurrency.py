"""Every op at a model's shape from several Python threads, in a forked child, and in turns with torch's own ops."""

import os
import threading

import pytest
import torch

from fastdit import ops
from fastdit.testing import bench, close
from fastdit.testing.workloads import Maker

pytestmark = pytest.mark.alone

WORKLOADS = [workload for workload, _ in bench.cases(suite="smoke")]
each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=str)


def step(workload, leaves=True):
    """A call without arguments: outputs, then the gradients of all floating arguments."""
    args, kwargs = workload.make(Maker(torch.float32))

    def leaf(t):
        return t.detach().requires_grad_() if leaves and isinstance(t, torch.Tensor) and t.is_floating_point() else t

    args = [leaf(a) for a in args]
    kwargs = {k: v if k in workload.fixed else leaf(v) for k, v in kwargs.items()}
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad]

    def run():
        out = close.flat(getattr(ops, workload.op)(*args, **kwargs, backend="cpu"))
        if not leaves:
            return out
        used = [o for o in out if o.requires_grad]
        grads = torch.autograd.grad(used, inputs, [torch.ones_like(o) for o in used], allow_unused=True)
        return [o.detach() for o in out] + [g for g in grads if g is not None]

    return run


@each_workload
def test_two_python_threads_at_once(workload):
    run = step(workload)
    expected, found = run(), {}

    def worker(name):
        found[name] = [run() for _ in range(3)]

    threads = [threading.Thread(target=worker, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "deadlock"
    assert len(found) == 2
    for results in (r for runs in found.values() for r in runs):
        for a, b in zip(results, expected, strict=True):
            close.assert_bitwise(a, b)


@each_workload
def test_after_fork(workload):
    """DataLoader workers: torch's OpenMP would hang there, ours runs on one thread."""
    run = step(workload, leaves=False)
    with torch.no_grad():
        expected = run()  # starts the OpenMP pool that a child will not have
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child():
        with torch.no_grad():
            found = run()
        queue.put(all((a.numpy() == b.numpy()).all() for a, b in zip(found, expected, strict=True)))

    process = context.Process(target=child)
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive, "the kernel hung in a forked child"
    assert queue.get()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads through /proc")
def test_one_pool_of_threads():
    """Kernels share torch's OpenMP threads: in turns with its GEMMs the process gains none."""
    a = torch.randn(512, 512)
    runs = [step(w) for w in WORKLOADS]
    for _ in range(2):
        a @ a
        a.sin()
    torch.autograd.grad((a.requires_grad_() @ a).sum(), a)
    runs[0]()
    before = len(os.listdir("/proc/self/task"))
    for run in runs:
        run()
        a.detach() @ a.detach()
    assert len(os.listdir("/proc/self/task")) == before
