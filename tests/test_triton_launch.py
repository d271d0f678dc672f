"""From an adapter's call to the driver: what is passed, what is cached, and what it costs the host.

No GPU is needed: compiled kernels, the driver and the two questions to torch.cuda are stubs, of C where cost counts.
Everything else is the path that a GPU takes, in the interpreter's process with the interpreter switched off.
"""

import threading
import timeit
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from triton.backends.nvidia import driver as nvidia
from triton.runtime import _allocation

from fastdit import ops
from fastdit.backends import _facts, registry
from fastdit.backends.triton import _launch
from fastdit.testing.workloads import Maker, samples

ANYTHING = "".format  # a C function that takes any positional arguments


def _launcher(start, scratch=0):
    """Triton's own launcher of a compiled kernel, with `start` for its C function."""
    made = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
    made.launch, made.num_ctas, made.launch_cooperative_grid, made.launch_pdl = start, 1, False, True
    made.global_scratch_size, made.global_scratch_align = scratch, 128
    made.profile_scratch_size, made.profile_scratch_align = 0, 1
    made.arg_annotations, made.kernel_signature = ["annotations"], b"signature"
    return made


def _compiled(start, scratch=0):
    return SimpleNamespace(run=_launcher(start, scratch), function=77, packed_metadata=(4, 1, 2048))


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU. `gpu.start` receives what the driver would, `gpu.built` the arguments of every compilation."""
    world = SimpleNamespace(start=ANYTHING, scratch=0, built=[])

    def slow(kernel, grid, args, num_warps, num_stages):
        world.built.append((kernel, grid, args, num_warps, num_stages))
        return _compiled(world.start, world.scratch)

    monkeypatch.setattr(_launch, "INTERPRET", False)
    monkeypatch.setattr(_launch, "on_cpu", True)
    monkeypatch.setattr(_launch, "_ready", {})
    monkeypatch.setattr(_launch, "_slow", slow)
    cuda = dict(_cuda_getDevice=(-1).__index__, _cuda_getCurrentRawStream=(10).__add__)  # a CPU tensor's device is -1
    monkeypatch.setattr(_launch, "_C", SimpleNamespace(**cuda))
    _facts.forget()
    yield world
    _facts.forget()  # plans remember what the stub built


KERNEL, OTHER = object(), object()


def _launch_once(kernel=KERNEL, tensors=None, numbers=(3, 0.5), constants=(8, None, True), warps=4, stages=2):
    x = torch.empty(64)
    _launch.launch(
        kernel, (5, 6, 7), (x, None, x[4:]) if tensors is None else tensors, numbers, constants, warps, stages
    )


def test_first_launch_compiles_and_the_next_ones_run(gpu):
    calls = []
    gpu.start = lambda *args: calls.append(args)
    x, y = torch.empty(64), torch.empty(64)
    _launch_once(tensors=(x, None, y), numbers=(3, 0.5))
    assert not calls and gpu.built == [(KERNEL, (5, 6, 7), (x, None, y, 3, 0.5, 8, None, True), 4, 2)]
    _launch_once(tensors=(y, None, x), numbers=(4, 0.25))  # other numbers, other tensors: no other build
    assert len(gpu.built) == len(calls) == 1
    assert (y.data_ptr(), None, x.data_ptr(), 4, 0.25, 8, None, True) in (calls[0][-1], calls[0][-8:])


@pytest.mark.parametrize(
    "other",
    [
        dict(kernel=OTHER),
        dict(constants=(8, None, False)),
        dict(warps=8),
        dict(stages=3),
        dict(tensors=(torch.empty(64), torch.empty(64), torch.empty(64))),
        dict(tensors=(torch.empty(64), None, torch.empty(64, dtype=torch.bfloat16))),
        dict(tensors=(torch.empty(64), None, torch.empty(64)[1:])),
        dict(tensors=(torch.empty(64)[1:], None, torch.empty(64))),
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_needs_a_build_of_its_own(gpu, other):
    _launch_once()
    _launch_once(**other)
    assert len(gpu.built) == 2
    _launch_once(**other)
    _launch_once()
    assert len(gpu.built) == 2


def test_one_plan_has_a_build_for_each_alignment_and_dtype(gpu):
    plan, ran = _launch.Launch(KERNEL, (5, 6, 7), (3,), (8,)), []
    x, y = torch.empty(64), torch.empty(65)
    variants = [(x, y), (x, y[1:]), (x, y.bfloat16()), (x, None)]
    for i, tensors in enumerate(variants):
        gpu.start = lambda *_, i=i: ran.append(i)
        plan(*tensors)
    for tensors in (*variants, *reversed(variants)):
        plan(*tensors)
    assert ran == [0, 1, 2, 3, 3, 2, 1, 0] and len(gpu.built) == 4


def test_descriptors(gpu):
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.empty(64, 64)

    def described(*block):
        return TensorDescriptor(x, [64, 64], [64, 1], list(block))

    for block in ((16, 16), (16, 16), (32, 16)):
        _launch_once(tensors=(x, described(*block), None))
    assert len(gpu.built) == 2


@pytest.mark.parametrize("scratch", [0, 64], ids=["direct", "scratch"])
def test_driver_gets_what_tritons_launcher_gives_it(gpu, monkeypatch, scratch):
    """The C function of this version of Triton: its arguments, position by position."""
    calls = []
    compiled = _compiled(lambda *args: calls.append(args), scratch)
    monkeypatch.setattr(_launch, "_scratch", lambda size, alignment, stream: (size, alignment, stream))
    _launch._offer_memory()
    grid, args = (5, 6, 7), (123, 4, 0.5, None, True)
    compiled.run(*grid, 9, compiled.function, compiled.packed_metadata, None, None, None, *args)
    _launch._runner(compiled)(grid, 9, args)
    assert len(calls) == 2 and calls[0] == calls[1]
    assert scratch == 0 or (5 * 6 * 7 * 64, 128, 9) in calls[1]
    _allocation._allocator.set(_allocation.NullAllocator())


def test_scratch_memory_in_a_thread_of_its_own(gpu, monkeypatch):
    """Autograd runs on other threads, which do not inherit Triton's allocator."""
    monkeypatch.setattr(_launch, "_scratch", lambda size, alignment, stream: size)
    run, failed = _launch._runner(_compiled(ANYTHING, 64)), []

    def work():
        try:
            run((1, 1, 1), 0, ())
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


def test_unknown_launcher_is_called_as_it_is():
    calls = []

    def run(*args):
        calls.append(args)

    _launch._runner(SimpleNamespace(run=run, function=77, packed_metadata=(4,)))((1, 2, 3), 9, (5, 6))
    assert calls == [(1, 2, 3, 9, 77, (4,), None, None, None, 5, 6)]


def test_profilers_see_every_launch(gpu):
    """A hook needs what only Triton's own way collects."""
    hook = _launch._hooks
    _launch_once()
    _launch_once()
    assert len(gpu.built) == 1
    hook.add(print)
    try:
        _launch_once()
    finally:
        hook.remove(print)
    assert len(gpu.built) == 2


def test_another_device_is_made_current(gpu, monkeypatch):
    devices = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            devices.append(self.index)
            monkeypatch.setattr(_launch._C, "_cuda_getDevice", (self.index).__index__)

        def __exit__(self, *_):
            monkeypatch.setattr(_launch._C, "_cuda_getDevice", (3).__index__)

    monkeypatch.setattr(_launch._C, "_cuda_getDevice", (3).__index__)
    monkeypatch.setattr(torch.cuda, "device", Device)
    _launch_once()
    assert devices == [-1] and len(gpu.built) == 1


def test_refused_without_a_gpu(monkeypatch):
    x = torch.empty(2)
    monkeypatch.setattr(_launch, "on_cpu", False)
    assert "needs a GPU tensor; got cpu" in _launch.unfit(x)
    monkeypatch.setattr(_launch, "on_cpu", True)
    assert _launch.unfit(x) is None and "float64" in _launch.unfit(x.double())


# ---- plans --------------------------------------------------------------------------------------------------
TRITON = [s for s in samples() if "triton" in registry.implementations(s.op)]


def _padded(t):
    return torch.empty(*t.shape[:-1], t.shape[-1] + 8, dtype=t.dtype)[..., : t.shape[-1]]


def _shifted(t):
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)


def _calls(op):
    """Every sample of an op, and each again in another dtype, with other strides, and 2 or 4 bytes further on."""
    for sample in (s for s in TRITON if s.op == op):
        for dtype in (torch.float32, torch.bfloat16):
            args, kwargs = sample.make(Maker(dtype))
            yield f"{sample} {dtype}", args, kwargs
            for change in (_padded, _shifted):

                def changed(t, change=change):
                    return change(t) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dim() else t

                yield (
                    f"{sample} {dtype} {change.__name__}",
                    tuple(map(changed, args)),
                    {k: v if k in ("axes", "pos") else changed(v) for k, v in kwargs.items()},
                )


@pytest.mark.parametrize("op", sorted({s.op for s in TRITON}))
def test_plans_are_never_mistaken(gpu, monkeypatch, op):
    """Whatever was called before, a call launches what it launches first of all."""
    seen, run = [], _launch.Launch.__call__

    def watched(self, *tensors):
        kinds = [None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors]
        seen.append((self.kernel.fn.__name__, self.grid, self._rest, self.num_warps, self.num_stages, kinds))
        run(self, *tensors)

    monkeypatch.setattr(_launch.Launch, "__call__", watched)
    calls = list(_calls(op))

    def launches(args, kwargs):
        seen.clear()
        try:
            with torch.no_grad():
                getattr(ops, op)(*args, **kwargs, backend="triton")
        except (ValueError, TypeError, registry.NoBackend) as error:
            return str(error)
        return list(seen)

    first = []
    for _, args, kwargs in calls:
        _facts.forget()
        first.append(launches(args, kwargs))
    _facts.forget()
    for _ in range(2):  # in one go: every plan of the others is there
        for (name, args, kwargs), expected in zip(calls, first, strict=True):
            assert launches(args, kwargs) == expected, name
    made = [tuple(map(str, found)) for found in first if isinstance(found, list) and found]
    assert len(set(made)) > len(made) // 3 > 0  # else the variants would prove nothing


# ---- host cost ----------------------------------------------------------------------------------------------
def _us(call, number=200):
    call()
    return min(timeit.repeat(call, number=number, repeat=60)) / number * 1e6


def _at_most(bar, cost):
    """Other work on the machine only adds to a time: the least that several tries show is the cost.

    The bar is in us of a machine where F.layer_norm without grad costs 3; a slower one scales it.
    """
    x, found = torch.randn(1, 2, 8), []
    for _ in range(20):
        found.append(cost() / max(1.0, _us(lambda: F.layer_norm(x, (8,))) / 3.0))
        if found[-1] <= bar:
            print(f"\n{found[-1]:.1f} us, bar {bar}")
            return
    raise AssertionError(f"{min(found):.1f} us, bar {bar}")


@pytest.mark.alone
def test_cost_of_a_launch(gpu):
    """12 pointers, 20 numbers, 11 constants: the most that a kernel here takes. Without the driver's own time."""
    x = torch.empty(64)
    args = (KERNEL, (5, 6, 7), (*(x,) * 7, *(None,) * 5), tuple(range(20)), tuple(range(11)), 4, 3)
    _at_most(3.0, lambda: _us(lambda: _launch.launch(*args)))


# us above the outputs' allocation, without grad and under grad (forward). The bar is 6 and 15: ops over it are held
# where they stand. What is left: 1 to 6 us of checks, 2 of dispatch, 2.5 to find the plan, 2 of each launch.
OVER = {
    "norm_modulate": (10.0, 17.5),
    "gate_residual": (10.5, 17.5),
    "gate_residual_norm_modulate": (13.0, 21.0),
    "qk_norm_rope": (18.5, 33.5),
    "attention": (12.0, 19.5),
    "attention_varlen": (19.0, 29.5),
    "merge_attention": (9.2, 16.0),
    "causal_conv3d": (38.0, 52.0),
    "next_cache": (13.0, 19.0),
    "norm_silu": (10.5, 17.0),
    "patch_embed3d": (12.5, 19.0),
    "unpatchify3d": (11.5, 16.0),
}
FIRST = {s.op: s for s in reversed(samples()) if "triton" in registry.implementations(s.op)}


@pytest.mark.alone
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("op", FIRST)
def test_cost_of_an_op(gpu, op, grad):
    args, kwargs = FIRST[op].make(Maker(torch.float32))
    call = getattr(ops, op)
    with torch.no_grad():
        outputs = call(*args, **kwargs, backend="triton")
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    x = args[0].detach().requires_grad_(grad)

    def cost():
        with torch.set_grad_enabled(grad):
            whole = _us(lambda: call(x, *args[1:], **kwargs, backend="triton"))
        return whole - sum(_us(lambda o=o: torch.empty(o.shape, dtype=o.dtype)) for o in outputs)

    _at_most(OVER.get(op, (6.0, 15.0))[grad], cost)
