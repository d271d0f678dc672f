"""The one way an op is made: torch.ops.fastdit.<name>, its backward as an op of its own, and the eager fast path.

`Op(name, schema, ...)` registers
    fastdit::<name>(<schema>, str backend)                                           -> outputs
    fastdit::<name>_backward(Tensor? grad_i..., <schema>, saved..., bool[] needs, str backend) -> grads
with fake kernels and autograd. Calling it routes: `reference` is plain differentiable PyTorch; plain tensors in
plain eager skip the dispatcher (0.3 us; 5 us under grad); everything else (compile, modes, functorch, forward AD,
tracing, the profiler) goes through torch.ops, where each of those finds its hooks.

What plain eager does follows from the facts of the call (`backends/_facts.py`) but for looks into index tensors: it is
found once (`_known.py`), the checks passed, the backend, the arguments that were left out and, for a backend that has a
recorder, what its forward allocates and launches. The next call with these facts does only that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import _facts, registry
from . import _explain, _known

LIB = torch.library.Library("fastdit", "DEF")
# Index tensors live on the device; looking at them there would synchronise, so a GPU checks them only when asked.
CHECK_INDICES = os.environ.get("FASTDIT_CHECK", "") not in ("", "0")

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), str, float, int, bool, list, tuple))
_C: Any = torch._C
_allows_tf32 = _C._get_cublas_allow_tf32  # some kernels' dots follow it
_forward_ad: Any = torch.autograd.forward_ad
_WATCHERS = (
    _C._len_torch_dispatch_stack, _C._is_torch_function_mode_enabled, _C._functorch.peek_interpreter_stack,
    _C._get_tracing_state, torch.autograd._profiler_enabled,
)  # fmt: skip
_STEP_BY_STEP = object()  # of a call that is known to need every step every time


def _contiguous(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _watched() -> bool:
    """True when more than autograd may be watching what happens to tensors."""
    return _facts.any_of(_WATCHERS) or _forward_ad._current_level >= 0


def _ordinary(args: Sequence) -> bool:
    """True when nothing but autograd can be watching these arguments."""
    return _PLAIN.issuperset(map(type, args)) and not _watched()


def _as_given(*args) -> tuple:
    return args


class Op:
    """One differentiable operator of the library.

    Args:
        name: of the op; schema: its arguments and returns in torch's schema language, without the backend. The first
            argument is a tensor: its device decides.
        differentiable: names of the tensor arguments that have a gradient.
        check: (*args) -> args, or raises what is wrong with them. It gets them in the order of the schema, None where
            one was left out, and fills those in; it looks at nothing but facts. None: the caller has checked.
        fake: (*args) -> empty outputs; must give the strides that every backend gives.
        validate: (*args) -> None, looks into index tensors; run on the CPU, elsewhere only under FASTDIT_CHECK=1.
        saves: positions of the outputs that the backward wants back.
        grad_like: empty tensor in the layout that a gradient has, from the argument it belongs to.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        differentiable: tuple[str, ...],
        fake: Callable,
        check: Callable[..., tuple] | None = None,
        validate: Callable[..., None] | None = None,
        saves: tuple[int, ...] = (),
        grad_like: Callable[[Tensor], Tensor] = _contiguous,
    ) -> None:
        arguments, returns = (part.strip() for part in schema.rsplit("->", 1))
        arguments = arguments[1:-1]
        parsed = _C.parse_schema(f"fastdit::{name}({arguments}) -> {returns}")
        names = [a.name for a in parsed.arguments]
        self.name = name
        self.arguments = tuple(names)
        self.differentiable = differentiable
        self.saves = saves
        self.outputs = len(parsed.returns)
        self.count = len(names)
        self._wrt = tuple(names.index(n) for n in differentiable)
        self._tensors = tuple(
            i for i, a in enumerate(parsed.arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")
        )
        self._check = check or _as_given
        self._known: dict[tuple, Any] = _facts.memory()
        self._recent: list[tuple] = _facts.recents()
        self._validate: Any = validate
        self._fake = fake
        self._grad_like = grad_like

        outs = ", ".join(f"Tensor? grad_{i}" for i in range(self.outputs))
        kept = "".join(f", Tensor saved_{i}" for i in saves)
        grads = ", ".join(["Tensor"] * len(differentiable))
        LIB.define(f"{name}({arguments}, str backend) -> {returns}")
        LIB.define(f"{name}_backward({outs}, {arguments}{kept}, bool[] needs, str backend) -> ({grads})")
        LIB.impl(name, self._run, "CompositeExplicitAutograd")
        LIB.impl(f"{name}_backward", self._run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastdit::{name}", self._run_fake, lib=LIB)
        torch.library.register_fake(f"fastdit::{name}_backward", self._run_backward_fake, lib=LIB)
        torch.library.register_autograd(f"fastdit::{name}", self._autograd, setup_context=self._setup, lib=LIB)
        torch.library.register_autograd(f"fastdit::{name}_backward", self._twice, setup_context=None, lib=LIB)
        self._torch_op = getattr(torch.ops.fastdit, name).default
        self._torch_backward = getattr(torch.ops.fastdit, f"{name}_backward").default
        self._function = self._make_function()

    # -- calls ------------------------------------------------------------------------------------------
    def __call__(self, backend: str | None, *given):
        """given: the arguments in the order of the schema, as `check` takes them."""
        if torch.compiler.is_compiling() or _explain.probe.calls is not None or _watched():
            return self._call(backend, self._check(*given))
        settings = (backend or registry.wanted(), torch.is_grad_enabled(), _allows_tf32())
        call = _facts.recent(self._recent, given, *settings) or self._find(backend, given, settings)
        if call is None:
            return self._call(backend, self._check(*given))
        known, grad = call[3], call[4]
        tensors = known.tensors(given)
        args = given if known.same else None
        if self._validate is not None and (given[0].is_cpu or CHECK_INDICES):
            args = args or known.arguments(tensors)
            self._validate(*args)
        if grad:
            return self._function.apply(known, *tensors)
        if known.again is not None:
            outputs = known.again(tensors)
            if outputs is not None:
                return outputs
        return known.forward(tensors, args)

    def _find(self, backend: str | None, given: tuple, settings: tuple) -> tuple | None:
        """(..., known, whether autograd is to see it), or None for a call that needs every step every time."""
        try:
            grad = settings[1] and self._differentiates(given)
        except AttributeError:  # no tensor: what the check says
            return None
        facts = _facts.facts(given)
        if facts is None:
            return None
        key = (facts, *settings, grad)
        try:
            known = self._known.get(key)
        except TypeError:  # a tuple that holds a list
            return None
        if known is None:
            known = self._learn(key, backend, given)
        elif known is not _STEP_BY_STEP:
            known.remember(self._recent, given, settings, grad)
        return None if known is _STEP_BY_STEP else (None, None, None, known, grad)

    def _looks(self, args: Sequence) -> bool:
        """Whether to look into the index tensors of args."""
        return self._validate is not None and (args[0].is_cpu or CHECK_INDICES)

    def _differentiates(self, args: Sequence) -> bool:
        for i in self._wrt:
            if args[i] is not None and args[i].requires_grad:
                return True
        return False

    def _learn(self, key: tuple, backend: str | None, given: tuple) -> Any:
        alone = _known.apart(given, grad=True)
        args = self._check(*alone)
        impl = registry.select(self.name, args, backend)
        known: Any = None if impl.backend == "reference" else _known.learn(impl, alone, args, self._wrt)
        if len(self._known) >= _facts.MOST:
            self._known.clear()
        self._known[key] = known = known or _STEP_BY_STEP
        return known

    def _call(self, backend: str | None, args: tuple):
        if _explain.probe.calls is not None:
            _explain.intercept(self.name, args, backend)
        impl = registry.select(self.name, args, backend)
        if torch.compiler.is_compiling():
            return impl.forward(*args) if impl.backend == "reference" else self._torch_op(*args, impl.backend)
        if not _ordinary(args):
            if impl.backend == "reference":
                return impl.forward(*args)
            if _forward_ad._current_level >= 0:
                self._refuse_tangents(args)
            return self._torch_op(*args, impl.backend)
        if self._looks(args):
            self._validate(*args)
        if impl.backend != "reference" and torch.is_grad_enabled() and self._differentiates(args):
            known = _known.as_it_is(impl, args, self._wrt)
            return self._function.apply(known, *known.tensors(args))
        return impl.forward(*args)

    def _refuse_tangents(self, args: Sequence) -> None:
        # torch would drop them without a word
        if any(isinstance(a, Tensor) and _forward_ad.unpack_dual(a).tangent is not None for a in args):
            raise RuntimeError(
                f"{self.name}: forward-mode AD is not supported; got a dual tensor, expected plain ones; "
                "use backend='reference' for tangents"
            )

    # -- the torch op -----------------------------------------------------------------------------------
    def _run(self, *args):
        args, backend = args[:-1], args[-1]
        if self._looks(args):
            self._validate(*args)
        return registry.get(self.name, backend).forward(*args)

    def _run_fake(self, *args):
        return self._fake(*args[:-1])

    def _run_backward(self, *args):
        args, needs, backend = args[:-2], args[-2], args[-1]
        grads = registry.get(self.name, backend).backward(*args, needs)
        inputs = args[self.outputs : self.outputs + self.count]
        owned: list[Tensor] = []
        taken = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}  # an op returns no input
        for i, grad in zip(self._wrt, grads, strict=True):
            if grad is None:
                owned.append(self._absent(inputs))
                continue
            like = self._grad_like(inputs[i])
            memory = grad.untyped_storage().data_ptr()
            if memory in taken or grad.stride() != like.stride() or grad.dtype != like.dtype:
                grad = like.copy_(grad)
            taken.add(memory)
            owned.append(grad)
        return owned[0] if len(owned) == 1 else tuple(owned)

    def _run_backward_fake(self, *args):
        args, needs = args[:-2], args[-2]
        inputs = args[self.outputs : self.outputs + self.count]
        grads = [
            self._grad_like(inputs[i]) if need else self._absent(inputs)
            for i, need in zip(self._wrt, needs, strict=True)
        ]
        return grads[0] if len(grads) == 1 else tuple(grads)

    @staticmethod
    def _absent(inputs: Sequence) -> Tensor:
        # a custom op cannot return None: an empty tensor stands for a gradient that nobody asked for
        return next(a for a in inputs if a is not None).new_empty(0)

    # -- autograd ---------------------------------------------------------------------------------------
    def _setup(self, ctx, inputs, output) -> None:
        *args, ctx.backend = inputs
        outputs = output if isinstance(output, tuple) else (output,)
        places = [i for i in self._tensors if args[i] is not None]
        ctx.set_materialize_grads(False)
        ctx.places, ctx.rest = places, [None if i in places else a for i, a in enumerate(args)]
        ctx.save_for_backward(*[args[i] for i in places], *[outputs[i] for i in self.saves])

    def _restore(self, ctx) -> list:
        saved, args = ctx.saved_tensors, ctx.rest.copy()
        count = len(ctx.places)
        for i, tensor in zip(ctx.places, saved[:count], strict=True):
            args[i] = tensor
        return [*args, *saved[count:]]

    def _autograd(self, ctx, *grads):
        needs = [ctx.needs_input_grad[i] for i in self._wrt]
        given = self._torch_backward(*grads, *self._restore(ctx), needs, ctx.backend)
        return (*self._place(given, needs), None)

    def _place(self, given, needs: list[bool]) -> list:
        given = given if isinstance(given, (tuple, list)) else (given,)
        out: list = [None] * self.count
        for i, grad, need in zip(self._wrt, given, needs, strict=True):
            out[i] = grad if need else None
        return out

    def _twice(self, ctx, *grads):
        raise RuntimeError(
            f"{self.name}: double backward is not supported; "
            "got a gradient of a gradient, expected one backward; use backend='reference' for second derivatives"
        )

    def _make_function(self):
        op = self

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx, known, *tensors):
                output = known.forward(tensors)
                ctx.known = known
                ctx.set_materialize_grads(False)
                outputs = output if isinstance(output, tuple) else (output,)
                ctx.save_for_backward(*tensors, *[outputs[i] for i in op.saves])
                return output

            @staticmethod
            def backward(ctx, *grads):
                known, saved = ctx.known, ctx.saved_tensors
                needs = [k is not None and ctx.needs_input_grad[k + 1] for k in known.wrt]
                count = len(saved) - len(op.saves)
                if torch.is_grad_enabled():  # create_graph: the op whose own autograd raises
                    args = (*known.arguments(saved), *saved[count:])
                    given = op._torch_backward(*grads, *args, needs, known.impl.backend)
                else:
                    given = known.backward(grads, saved, needs)
                out: list = [None] * (count + 1)
                given = given if isinstance(given, (tuple, list)) else (given,)
                for k, grad, need in zip(known.wrt, given, needs, strict=True):
                    if need:
                        out[k + 1] = grad
                return tuple(out)

        Eager.__name__ = Eager.__qualname__ = f"{self.name}_eager"
        return Eager
