"""`accelerate`: find the blocks that a model shares with `KINDS`, patch them, and say what was done."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from fastdit import ops as fastdit_ops
from fastdit.integrations import diffusers, registry
from fastdit.integrations.diffusers_processor import per_model
from fastdit.integrations.registry import KINDS, Kind
from fastdit.integrations.report import Report, Row, left_rows
from fastdit.ops.conv_check import ALGOS


def accelerate(
    model: object,
    *,
    ops: Iterable[str] | None = None,
    precision: str | None = None,
    exclude: Iterable[str] | None = None,
    conv_algo: str = "auto",
) -> Report:
    """Run the known layers of a model through fastdit's ops, in place; `restore` undoes it.

    Replaces methods of instances: classes, parameters, state-dict keys and processors' names stay. Linear layers are
    called, never read, so LoRA and quantised weights keep working. A block that is known only in part is left whole.

    Args:
        model (nn.Module, diffusers pipeline, or a list of them): a pipeline's transformers and VAEs are taken.
        ops (iterable of op names, optional): use only these, e.g. {"attention"}. Default: all.
        precision ("native" | "fp32", optional): rounding of modulation. Default: that of the original model.
        exclude (iterable of glob patterns, optional): names of submodules to leave as they are, with all below
            them, e.g. ["transformer_blocks.0", "decoder.*"]. A pattern that matches nothing is an error.
        conv_algo ("auto" | "direct" | "winograd" | "winograd2d"): of `ops.causal_conv3d`, on the CPU and for the
            convolutions that it fits, of 32 channels and more; the others take "auto". "winograd2d" makes a bf16
            VAE faster where auto takes direct (AVX-512 BF16), for three roundings of a product instead of one.
    Returns:
        Report: `print` it for what was replaced, what was left and why; `report.verify(*inputs)` compares.
    Raises:
        TypeError: there is no torch module in `model`.   ValueError: unknown op, precision, pattern or algo.

    Call it before hooks that wrap `forward` (offload, caching, casting); it is idempotent.
    """
    roots = torch_roots(model, "accelerate")
    patterns = [exclude] if isinstance(exclude, str) else list(exclude or ())
    allowed = None if ops is None else {ops} if isinstance(ops, str) else set(ops)
    check_options(roots, allowed, precision, patterns, conv_algo)
    restore(roots)  # so that a second call means what it says, whatever the first one did
    diffusers.register_if_used()

    rows: dict[tuple, Row] = {}
    covered: set[nn.Module] = set()  # replaced, driven or absorbed by a known block: not listed again
    driven: set[nn.Module] = set()  # below a replaced block, patched or absorbed by it: no other kind looks at them
    for root in roots:
        inside: dict[str, bool] = {}  # blocks by name: is it one whose structure is known in full?
        processors: dict = {}  # the model's own
        for name, module in root.named_modules():
            if module in driven:
                continue
            for kind, unknown in candidates(module):
                if kind.block:
                    inside[name] = unknown is None
                patches = list(kind.patches(module)) if unknown is None else []
                absorbed = [m for m in kind.absorbs(module) if m is not None] if unknown is None else []
                why = (
                    outside(kind, name, inside) or refusal(kind, name, patches, absorbed, allowed, patterns) or unknown
                )
                if why is None:
                    read = readers(patches, absorbed)
                    for owner, attribute, replacement in patches:
                        replacement = per_model(replacement, processors)
                        law = precision or kind.precision
                        registry.patch(owner, attribute, replacement, kind, law, read[owner], conv_algo)
                own = {owner for owner, _, _ in patches}.union(absorbed)
                covered.update(own, [module])
                if why is None:
                    driven.update(own - {module})
                row = rows.setdefault((kind.name, why), Row(kind.name, why is None, why or ", ".join(kind.ops)))
                row.count += 1
                row.saving += 0 if why else kind.saving(module)
                row.unit = kind.unit
    left = left_rows(roots, covered)
    options = {"ops": allowed, "precision": precision, "exclude": patterns, "conv_algo": conv_algo}
    return Report(roots, [*rows.values(), *left], options)


def candidates(module: nn.Module) -> list[tuple[Kind, str | None]]:
    """The kinds that a module may be of, and what speaks against each. What one kind of part takes is no other's."""
    found = [(kind, kind.refuse(module)) for kind in KINDS if kind.match(module)]
    taken = any(kind.part and why is None for kind, why in found)
    return [(kind, why) for kind, why in found if why is None or not (taken and kind.part)]


def restore(model: object) -> None:
    """Undo `accelerate`: every module gets back the very methods and attributes it had.

    Raises:
        TypeError: there is no torch module in `model`.
        RuntimeError: a method was wrapped by somebody else since (a hook); nothing is undone.
    """
    patched = [module for root in torch_roots(model, "restore") for module in registry.patched_modules(root)]
    for module in patched:
        if not registry.is_intact(module):
            raise RuntimeError(
                f"restore: a method of {type(module).__name__} was replaced after accelerate; got a foreign method, "
                "expected fastdit's own; remove the hooks that were added since, then call restore again."
            )
    for module in dict.fromkeys(patched):
        registry.unpatch(module)


def torch_roots(model: object, caller: str) -> list[nn.Module]:
    """The modules to work on: the model itself, a pipeline's transformers and VAEs, or those of each list item."""
    if isinstance(model, nn.Module):
        return [model]
    found: list[nn.Module] = []
    if isinstance(model, (list, tuple)):
        found = [root for item in model for root in torch_roots(item, caller)]
    elif isinstance(components := getattr(model, "components", None), dict):
        wanted = [c for name, c in components.items() if name.startswith(("transformer", "vae"))]
        found = [c for c in wanted if isinstance(c, nn.Module)]
    if not found:
        raise TypeError(
            f"{caller}: nothing of torch to work on; got {type(model).__name__}, "
            "expected an nn.Module, a diffusers pipeline or a list of them; pass the transformer or the VAE itself."
        )
    return list(dict.fromkeys(found))


def check_options(
    roots: list[nn.Module], allowed: set[str] | None, precision: str | None, patterns: list[str], conv_algo: str
) -> None:
    unknown = sorted(name for name in allowed or () if not hasattr(fastdit_ops, name))
    if unknown:
        known = sorted({op for kind in KINDS for op in kind.ops})
        raise ValueError(f"accelerate: unknown op; got {', '.join(unknown)}, expected some of {', '.join(known)}.")
    if precision not in (None, "native", "fp32"):
        raise ValueError(f'accelerate: unknown precision; got {precision!r}, expected None, "native" or "fp32".')
    if conv_algo not in ALGOS:
        raise ValueError(f"accelerate: unknown conv_algo; got {conv_algo!r}, expected one of {', '.join(ALGOS)}.")
    names = [name for root in roots for name, _ in root.named_modules()]
    for pattern in patterns:
        if not any(is_excluded(name, [pattern]) for name in names):
            raise ValueError(
                f"accelerate: exclude matches no submodule; got {pattern!r}, expected a name from named_modules() "
                "or a glob pattern; check the spelling."
            )


def is_excluded(name: str, patterns: list[str]) -> bool:
    """Does a pattern match this module's name or the name of a module above it?"""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), p) for p in patterns for n in range(1, len(parts) + 1))


def readers(patches: list, absorbed: list[nn.Module]) -> dict[nn.Module, list[nn.Module]]:
    """Which patched module reads which absorbed one: the smallest around it."""
    below = {owner: set(owner.modules()) for owner, _, _ in patches}
    read: dict[nn.Module, list[nn.Module]] = {owner: [] for owner in below}
    for module in absorbed:
        around = [owner for owner, modules in below.items() if module in modules]
        if around:
            read[min(around, key=lambda owner: len(below[owner]))].append(module)
    return read


def outside(kind: Kind, name: str, inside: dict[str, bool]) -> str | None:
    """Why a layer stays because of what is around it: blocks are replaced whole or not at all."""
    above = [known for block, known in inside.items() if name.startswith(f"{block}.") or not block]
    if not all(above):
        return "inside a block that is left"
    return "in no block that is known" if kind.part and not above and name else None  # without a name: asked for itself


def refusal(
    kind: Kind,
    name: str,
    patches: list,
    absorbed: list[nn.Module],
    allowed: set[str] | None,
    patterns: list[str],
) -> str | None:
    """Why a block whose structure is known stays as it is, or None."""
    if is_excluded(name, patterns):
        return "excluded"
    if allowed is not None and not allowed.issuperset(kind.ops):
        return f"needs {', '.join(op for op in kind.ops if op not in allowed)}, which ops= leaves out"
    for owner, attribute, _ in patches:
        if registry.foreign_forward(owner, attribute):
            return f"{type(owner).__name__}.{attribute} is wrapped already (a hook?): accelerate first, add hooks later"
    hooked = registry.has_hooks(absorbed) if patches else None
    return None if hooked is None else f"{hooked} carries a hook, which would no longer run"
