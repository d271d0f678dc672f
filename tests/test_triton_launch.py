"""From an adapter's call to the driver: what is passed, what is cached, and what it costs the host.

No GPU is needed: compiled kernels, the driver and the two questions to torch.cuda are stubs, of C where cost counts.
Everything else is the path that a GPU takes, in the interpreter's process with the interpreter switched off.
"""

import functools
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from host_cost import at_most
from triton.backends.nvidia import driver as nvidia
from triton.runtime import _allocation

from fastdit import ops
from fastdit.backends import _facts, registry
from fastdit.backends.triton import _launch, _record
from fastdit.ops import _op
from fastdit.testing.workloads import Maker, samples

ANYTHING = "".format  # a C function that takes any positional arguments


def _launcher(start, scratch=0):
    """Triton's own launcher of a compiled kernel, with `start` for its C function."""
    made = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
    made.launch, made.num_ctas, made.launch_cooperative_grid, made.launch_pdl = start, 1, False, True
    made.global_scratch_size, made.global_scratch_align = scratch, 128
    made.profile_scratch_size, made.profile_scratch_align = 0, 1
    if _launch.VERSION >= (3, 7):
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
FIRST = {s.op: s for s in reversed(TRITON)}


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


def _tensors(*values):
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


class Driver:
    """Hears what starts, whoever starts it, and tells pointers by what they point into."""

    def __init__(self, gpu, monkeypatch):
        self.kernels, self.heard = [], []
        monkeypatch.setattr(_launch, "_slow", self.slow)
        gpu.start = self.start

    def slow(self, kernel, grid, args, num_warps, num_stages):
        """Builds and runs, as Triton does."""
        pointers = sum(a is None or hasattr(a, "data_ptr") or hasattr(a, "base") for a in args)
        made = _compiled(self.start)
        made.function = len(self.kernels)
        self.kernels.append((kernel.fn.__name__, pointers, num_warps, num_stages))
        tensors = [a.data_ptr() if hasattr(a, "data_ptr") else a for a in args[:pointers]]
        _launch._runner(made)(grid, 0, (*tensors, *args[pointers:]))
        return made

    def start(self, *call):
        arguments = call[-1] if _launch.VERSION >= (3, 7) else call[13:]
        self.heard.append((call[:3], call[4], arguments))

    def told(self, inputs, outputs):
        """What was heard since the last time: grids, kernels, numbers, and what each pointer points to."""
        names = {t.data_ptr(): f"output {i}" for i, t in enumerate(outputs)}
        names |= {t.data_ptr(): f"input {i}" for i, t in enumerate(inputs)}
        found = []
        for grid, function, arguments in self.heard:
            name, pointers, *options = self.kernels[function]
            told = [p if p is None or not isinstance(p, int) else names.get(p, "made") for p in arguments[:pointers]]
            found.append((function, name, *options, grid, tuple(map(str, told)), arguments[pointers:]))
        self.heard.clear()
        return found


def _forward(op, args, kwargs):
    """The tensors that a call reads and those that it makes."""
    with torch.no_grad():
        outputs = getattr(ops, op)(*args, **kwargs, backend="triton")
    return _tensors(args, kwargs), _tensors(outputs)


def _backward(op, args, kwargs):
    """The same of its backward; every second incoming gradient lies in a larger tensor."""
    leaves = []

    def leaf(t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        leaves.append(t.detach().requires_grad_())
        return leaves[-1]

    args, kwargs = tuple(map(leaf, args)), {k: v if k in ("axes", "pos") else leaf(v) for k, v in kwargs.items()}
    outputs = _tensors(getattr(ops, op)(*args, **kwargs, backend="triton"))
    outputs = [o for o in outputs if o.requires_grad]
    grads = [_padded(o) if i % 2 and o.dim() else torch.empty_like(o) for i, o in enumerate(outputs)]
    made = torch.autograd.grad(outputs, leaves, grads, allow_unused=True) if outputs else ()
    return [*_tensors(args, kwargs), *outputs, *grads], _tensors(made)


@pytest.fixture
def held(monkeypatch):
    """What is allocated, so that no output lies where a temporary tensor lay."""
    made = []
    names = "empty", "empty_like", "zeros", "zeros_like", "new_empty", "new_empty_strided", "contiguous", "reshape"
    for place, name in itertools.product((torch, torch.Tensor), names):
        if hasattr(place, name):
            make = getattr(place, name)
            monkeypatch.setattr(place, name, lambda *a, make=make, **k: made.append(make(*a, **k)) or made[-1])
    return made


@pytest.mark.parametrize("again", [_record.again, _record._again], ids=["compiled", "python"])
@pytest.mark.parametrize("run", [_forward, _backward], ids=["forward", "backward"])
@pytest.mark.parametrize("op", sorted({s.op for s in TRITON}))
def test_plans_are_never_mistaken(gpu, monkeypatch, held, op, run, again):
    """Whatever was called before, a call launches what it launches first of all, on its own tensors."""
    monkeypatch.setattr(_record, "again", again)
    driver, calls = Driver(gpu, monkeypatch), list(_calls(op))

    def launches(args, kwargs):
        try:
            inputs, outputs = run(op, args, kwargs)
        except (ValueError, TypeError, registry.NoBackend) as error:
            driver.heard.clear()
            return str(error)
        told = driver.told(inputs, outputs)
        held.clear()
        return told

    first = []
    for _, args, kwargs in calls:
        _facts.forget()
        first.append(launches(args, kwargs))
    _facts.forget()
    for _ in range(3):  # in one go, every plan of the others is there: as found, recorded, and done again
        for (name, args, kwargs), expected in zip(calls, first, strict=True):
            assert launches(args, kwargs) == expected, name
    made = [tuple(map(str, found)) for found in first if isinstance(found, list) and found]
    assert len(set(made)) > len(made) // 3 > 0  # else the variants would prove nothing


# ---- recorded forwards --------------------------------------------------------------------------------------
def _recorded(gpu, monkeypatch):
    """A driver, a call of norm_modulate that is recorded, and its inputs."""
    driver, (x, shift) = Driver(gpu, monkeypatch), (torch.randn(2, 6, 72), torch.randn(2, 72))

    def call():
        with torch.no_grad():
            y = ops.norm_modulate(x, shift=shift, backend="triton")
        return driver.told([x, shift], [y])

    first = call()
    assert first == call() == call() and len(first) == 1
    return driver, call, first


@pytest.mark.parametrize("op", FIRST)
def test_every_op_is_recorded(gpu, monkeypatch, op):
    """The third call asks no adapter: neither for a plan nor for a launch."""
    args, kwargs = FIRST[op].make(Maker(torch.bfloat16))
    with torch.no_grad():
        for _ in range(2):
            getattr(ops, op)(*args, **kwargs, backend="triton")
        monkeypatch.setattr(_launch.Launch, "__call__", None)
        getattr(ops, op)(*args, **kwargs, backend="triton")


@pytest.mark.parametrize("op", sorted(set(FIRST) - {"next_cache", "qk_norm_rope"}))
def test_every_backward_is_recorded(gpu, monkeypatch, op):
    """`next_cache` computes with torch, as do a norm's weight beside a cache and the gradients of
    RoPE's tables."""
    args, kwargs = FIRST[op].make(Maker(torch.bfloat16))
    kwargs.pop("cache", None)
    for _ in range(2):
        _backward(op, args, kwargs)
    monkeypatch.setattr(_launch.Launch, "__call__", None)
    _backward(op, args, kwargs)


def test_a_backward_of_the_same_graph_runs_again(gpu, monkeypatch):
    """With other gradients, with none for one output, and from tensors that came back with other strides."""
    driver, q = Driver(gpu, monkeypatch), torch.randn(1, 6, 2, 32, requires_grad=True)
    k, v = torch.randn(2, 1, 6, 2, 32)

    def transposed(t):
        return t if t.dim() != 4 else t.transpose(1, 2).contiguous().transpose(1, 2)

    told = []
    for pack in (lambda t: t, transposed):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            o, lse = ops.attention(q, k, v, return_lse=True, backend="triton")
        for inputs in ([o, lse], [o], [lse]):
            heard = []
            for _ in range(4):
                driver.heard.clear()
                grads = [torch.randn_like(t) for t in inputs]
                (dq,) = torch.autograd.grad(inputs, [q], grads, retain_graph=True)
                heard.append(driver.told([q, k, v, lse, *grads], [dq]))
            assert heard[0] == heard[1] == heard[2] == heard[3]
            told.append(heard[0])
    assert len(set(map(str, told))) == len(told)  # else the variants would prove nothing


def test_two_gradients_in_one_place_are_not_recorded(gpu, monkeypatch):
    """What an adapter does with one tensor twice is no way for two of them."""
    x, y, gate = torch.randn(1, 6, 8), torch.randn(1, 6, 8), torch.randn(1, 8)
    recorded = []
    monkeypatch.setitem(registry.recorders, "triton", lambda *a: recorded.append(a) or _record.record(*a))
    for _ in range(4):
        leaves = [t.requires_grad_() for t in (x, y, gate)]
        outputs = ops.gate_residual_norm_modulate(*leaves, backend="triton")
        grad = torch.randn_like(x)
        torch.autograd.grad(outputs, leaves, [grad, grad.view(1, 6, 8)])
    assert len(recorded) == 1  # the forward


def test_a_profiler_sees_what_was_recorded(gpu, monkeypatch):
    driver, call, first = _recorded(gpu, monkeypatch)
    builds = len(driver.kernels)
    _launch._hooks.add(print)
    try:
        call()
        assert len(driver.kernels) == builds + 1  # Triton's own way, which a hook needs
    finally:
        _launch._hooks.remove(print)
    assert call() == first


def test_what_was_recorded_runs_on_its_device(gpu, monkeypatch):
    _, call, first = _recorded(gpu, monkeypatch)
    entered = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            monkeypatch.setattr(_launch._C, "_cuda_getDevice", self.index.__index__)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(_launch._C, "_cuda_getDevice", (3).__index__)
    assert call() == first and entered == [-1]


def test_tf32_is_a_fact(gpu, monkeypatch):
    driver, x = Driver(gpu, monkeypatch), torch.randn(1, 64, 2, 32)

    def call():
        with torch.no_grad():
            o = ops.attention(x, x, x, backend="triton")
        return driver.told([x], [o])

    exact = call()
    assert call() == call() == exact
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = call()
        assert call() == call() == rounded != exact
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert call() == exact


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, y: _empty_after(x.clone()),
        lambda x, y: _empty_after(torch.empty_like(x).zero_()),
        lambda x, y: x,
        lambda x, y: torch.empty_like(x)[:1],
        lambda x, y: torch.empty_like(x).view(-1),
        lambda x, y: (torch.empty_like(x), None),
        lambda x, y: torch.empty_like(x, device="meta"),
    ],
    ids=["copies", "fills", "returns-an-input", "slice", "view", "none", "device"],
)
def test_what_is_no_list_of_launches_is_not_recorded(gpu, forward):
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    assert _record.record(forward, (x, y), (x, y))[1] is None


def _empty_after(t):
    return torch.empty_like(t)


def test_views_are_known_by_whose_they_are(gpu, monkeypatch):
    driver, plan = Driver(gpu, monkeypatch), _launch.Launch(KERNEL_NAMED, (1, 1, 1), (), ())

    def forward(x, y):
        out = torch.empty(2, 64)
        plan(x[2:], y, out[1], out)
        return out

    def fresh():
        return torch.randn(4, 16), torch.randn(4, 16)

    x, y = fresh()
    _, again = _record.record(forward, (x, y), (x, y))
    driver.heard.clear()
    x, y = fresh()
    out = again((x, y))
    pointers = driver.heard[-1][2]
    assert pointers == (x[2:].data_ptr(), y.data_ptr(), out[1].data_ptr(), out.data_ptr())
    both = torch.randn(8, 16)  # a view of which of the two?
    assert _record.record(forward, (both[:4], both[4:]), (both[:4], both[4:]))[1] is None


KERNEL_NAMED = SimpleNamespace(fn=SimpleNamespace(__name__="kernel"))


# ---- host cost ----------------------------------------------------------------------------------------------
@pytest.mark.alone
@pytest.mark.parametrize("held, bar", [(True, 3.0), (False, 4.5)], ids=["of-a-plan", "on-its-own"])
def test_cost_of_a_launch(gpu, held, bar):
    """12 pointers, 20 numbers, 11 constants: the most that a kernel here takes. Without the driver's own time."""
    tensors = (*(torch.empty(64),) * 7, *(None,) * 5)
    rest = (tuple(range(20)), tuple(range(11)), 4, 3)
    planned = _launch.Launch(KERNEL, (5, 6, 7), *rest)
    at_most(bar, lambda: planned(*tensors) if held else _launch.launch(KERNEL, (5, 6, 7), tensors, *rest))


@pytest.mark.alone
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("op", FIRST)
def test_cost_of_an_op(gpu, monkeypatch, op, grad):
    """us above its outputs, without grad and under grad (forward)."""
    args, kwargs = FIRST[op].make(Maker(torch.float32))
    call = getattr(ops, op)
    # on a GPU nothing looks into index tensors
    monkeypatch.setattr(_op.Op, "_validate", property(lambda self: None), raising=False)
    with torch.no_grad():
        outputs = _tensors(call(*args, **kwargs, backend="triton"))
    x = args[0].detach().requires_grad_(grad)
    at_most(15.0 if grad else 6.0, functools.partial(call, x, *args[1:], **kwargs, backend="triton"), outputs, grad)
