"""Which kinds of blocks `accelerate` knows, and how one instance is patched and unpatched.

A kind is recognised by structure (submodules and attributes), never by a list of model classes, so a model that
reuses a known block is served without being named. Patching sets instance attributes only: classes, parameters and
state-dict keys stay as they are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastdit.integrations.absorbed import between_hooks

RECORD = "_fastdit"  # the one attribute a patched module carries besides what replaces its methods


@dataclass(frozen=True)
class Kind:
    """One kind of block: how to recognise it, when to leave it alone, what to put in its place.

    Args:
        name: shown in the report.
        ops: the fastdit ops that the replacement calls.
        match: is this module of this kind? By structure.
        refuse: why this instance has to stay as it is, or None.
        patches: (module, attribute, replacement) for the block and the submodules that it drives; functions are
            bound to their module. A function has the name of the attribute it replaces: pickle looks it up by name.
        absorbs: submodules whose work the replacement does itself; they are no longer called. None: absent ones.
        saving: bytes of memory traffic spared per `unit` of one call, from the block's sizes.
        unit: what `saving` counts, e.g. "token".
        precision: the rounding law of the original: "native" or "fp32" (`ops.norm_modulate`).
        block: a whole transformer block; where `refuse` leaves it, everything below it is left too.
        part: replaced only inside a block that some kind with `block=True` knows.
    """

    name: str
    ops: tuple[str, ...]
    match: Callable[[Any], bool]
    refuse: Callable[[Any], str | None]
    patches: Callable[[Any], Iterable[tuple[nn.Module, str, Any]]]
    absorbs: Callable[[Any], Iterable[nn.Module | None]] = lambda block: ()
    saving: Callable[[Any], int] = lambda block: 0
    unit: str = "token"
    precision: str = "native"
    block: bool = False
    part: bool = False


KINDS: list[Kind] = []


def register(kind: Kind) -> Kind:
    KINDS.append(kind)
    return kind


@dataclass
class Record:
    """What was done to one module: enough to undo it, also on a deep copy."""

    kind: str
    precision: str
    original: Callable  # the class's forward
    placed: dict[str, Any] = field(default_factory=dict)
    saved: dict[str, Any] = field(default_factory=dict)  # instance attributes that were there before
    absorbed: list[nn.Module] = field(default_factory=list)  # read by what was placed, no longer called
    conv_algo: str = "auto"


def record_of(module: nn.Module) -> Record | None:
    return module.__dict__.get(RECORD)


def original(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward that a module's class has, for the calls that its replacement does not cover.

    Kept in the record: Dynamo cannot trace `type(self).forward` of classes that it allows in its graph.
    """
    return getattr(self, RECORD).original(self, *args, **kwargs)


def is_intact(module: nn.Module) -> bool:
    """Nobody (a hook, another patch) has replaced what we placed."""
    record = record_of(module)
    return record is None or all(module.__dict__.get(name) is value for name, value in record.placed.items())


def foreign_forward(module: nn.Module, attribute: str) -> bool:
    """Does the instance carry its own method, set by somebody else (accelerate's and diffusers' hooks do so)?"""
    original = getattr(type(module), attribute, None)
    if original is None or attribute not in module.__dict__:  # a plain attribute, such as a processor
        return False
    return getattr(module.__dict__[attribute], "__func__", None) is not original


def has_hooks(modules: Iterable[nn.Module]) -> str | None:
    """The class of the first module with forward hooks: a module that is no longer called would not run them."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or foreign_forward(module, "forward"):
            return type(module).__name__
    return None


@functools.cache
def around_hooks(call: Callable) -> Callable:
    """A replacement that runs the hooks of what it absorbs; one for all modules of a kind."""

    def placed(self, *args, **kwargs):
        return between_hooks(getattr(self, RECORD).absorbed, call, self, *args, **kwargs)

    # torch.compile counts recompiles per code object: no two replacements share one
    placed.__code__ = placed.__code__.replace(co_name=call.__name__)
    return functools.wraps(call)(placed)


def patch(
    module: nn.Module,
    attribute: str,
    replacement: Any,
    kind: Kind,
    precision: str,
    absorbed: Iterable[nn.Module] = (),
    conv_algo: str = "auto",
) -> None:
    record = record_of(module)
    if record is None:
        record = Record(kind.name, precision, type(module).forward, conv_algo=conv_algo)
        module.__dict__[RECORD] = record
    if attribute in module.__dict__:
        record.saved[attribute] = module.__dict__[attribute]
    record.absorbed += [m for m in absorbed if m not in record.absorbed]
    placed = replacement
    if isinstance(replacement, types.FunctionType):
        placed = types.MethodType(around_hooks(replacement) if record.absorbed else replacement, module)
    record.placed[attribute] = placed
    module.__dict__[attribute] = placed


def unpatch(module: nn.Module) -> None:
    record = module.__dict__.pop(RECORD)
    for attribute in record.placed:
        del module.__dict__[attribute]
    module.__dict__.update(record.saved)


def patched_modules(root: nn.Module) -> Iterator[nn.Module]:
    return (module for module in root.modules() if record_of(module) is not None)
