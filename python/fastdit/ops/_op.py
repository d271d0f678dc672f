"""The one way an op is made: torch.ops.fastdit.<name>, its backward as an op of its own, and the eager fast path.

`Op(name, schema, ...)` registers
    fastdit::<name>(<schema>, str backend)                                           -> outputs
    fastdit::<name>_backward(Tensor? grad_i..., <schema>, saved..., bool[] needs, str backend) -> grads
with fake kernels and autograd. Calling it routes: `reference` is plain differentiable PyTorch; plain tensors in
plain eager skip the dispatcher (0.3 us; 5 us under grad); everything else (compile, modes, functorch, forward AD,
tracing, the profiler) goes through torch.ops, where each of those finds its hooks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from . import _explain

LIB = torch.library.Library("fastdit", "DEF")
# Index tensors live on the device; looking at them there would synchronise, so a GPU checks them only when asked.
CHECK_INDICES = os.environ.get("FASTDIT_CHECK", "") not in ("", "0")

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), str, float, int, bool, list, tuple))
_C: Any = torch._C
_forward_ad: Any = torch.autograd.forward_ad


def _contiguous(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _ordinary(args: Sequence) -> bool:
    """True when nothing but autograd can be watching these arguments."""
    return _PLAIN.issuperset(map(type, args)) and not (
        _C._len_torch_dispatch_stack()
        or _C._is_torch_function_mode_enabled()
        or _C._functorch.peek_interpreter_stack() is not None
        or _forward_ad._current_level >= 0
        or _C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


class Op:
    """One differentiable operator of the library.

    Args:
        name: of the op; schema: its arguments and returns in torch's schema language, without the backend. The first
            argument is a tensor: its device decides.
        differentiable: names of the tensor arguments that have a gradient.
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
        self._validate = validate
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
    def __call__(self, backend: str | None, *args):
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
        if self._validate is not None and (args[0].is_cpu or CHECK_INDICES):
            self._validate(*args)
        if impl.backend != "reference" and torch.is_grad_enabled():
            for i in self._wrt:
                if args[i] is not None and args[i].requires_grad:
                    return self._function.apply(impl, *args)
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
        if self._validate is not None and (args[0].is_cpu or CHECK_INDICES):
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
        self._save(ctx, args, outputs)

    def _save(self, ctx, args: Sequence, outputs: tuple) -> None:
        ctx.set_materialize_grads(False)
        ctx.rest = rest = list(args)
        ctx.places = places = [i for i in self._tensors if args[i] is not None]
        tensors = [args[i] for i in places]
        for i in places:
            rest[i] = None
        ctx.save_for_backward(*tensors, *(outputs[i] for i in self.saves))

    def _restore(self, ctx) -> list:
        saved, args = ctx.saved_tensors, list(ctx.rest)
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
            def forward(ctx, impl, *args):
                output = impl.forward(*args)
                ctx.impl = impl
                op._save(ctx, args, output if isinstance(output, tuple) else (output,))
                return output

            @staticmethod
            def backward(ctx, *grads):
                needs = [ctx.needs_input_grad[i + 1] for i in op._wrt]
                args = op._restore(ctx)
                if torch.is_grad_enabled():  # create_graph: the op whose own autograd raises
                    given = op._torch_backward(*grads, *args, needs, ctx.impl.backend)
                else:
                    given = ctx.impl.backward(*grads, *args, needs)
                return (None, *op._place(given, needs))

        Eager.__name__ = Eager.__qualname__ = f"{self.name}_eager"
        return Eager
