"""Imports flow one way. Read from the syntax trees, so an import inside a function counts too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "fastdit"

# From the top of the house to its ground: a module imports its own row or a lower one.
ROWS = (
    ("cli", "__main__"),
    ("demo",),
    ("testing",),
    ("integrations", "training", "generation"),
    ("models", "diffusion", "data"),
    ("nn",),
    ("ops",),
    ("packing", "backends", "reference"),
    ("kernels", "_cpu", "_cuda", "_cuda_sim"),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
KERNELS = (
    "torch",
    "triton",
    "math",
    "inspect",
    "os",
    "functools",
    "dataclasses",
    "typing",
    "collections",
    "__future__",
)


def imported(path: Path, package: tuple[str, ...]) -> list[str]:
    """Absolute dotted names of everything that a file imports; `package` is the one it stands in."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{source}.{alias.name}" for alias in node.names]
    return names


def layer(name: str) -> str | None:
    """The room of fastdit that a dotted name lies in; None for other packages, "" for the top package itself."""
    parts = name.split(".")
    if parts[0] != "fastdit":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in RANK else ""


def source_files():
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            yield pytest.param(path, room, id=str(path.relative_to(PACKAGE)))


def package_of(path: Path) -> tuple[str, ...]:
    return ("fastdit", *path.relative_to(PACKAGE).parts[:-1])


@pytest.mark.parametrize("path, room", source_files())
def test_imports_go_down(path, room):
    assert room in RANK, f"{path.name} stands in no row of the house: add it to ROWS and to CONTRIBUTING"
    for name in imported(path, package_of(path)):
        target = layer(name)
        if target is None:
            continue
        if target == "":
            assert RANK[room] <= RANK["testing"], f"{room} imports the top package ({name}), which imports {room}"
        else:
            assert RANK[target] >= RANK[room], f"{room} imports {name}, which stands above it"


@pytest.mark.parametrize("path", sorted((PACKAGE / "reference").glob("*.py")), ids=lambda p: p.name)
def test_reference_imports_torch_only(path):
    for name in imported(path, package_of(path)):
        allowed = name.split(".")[0] in ("torch", "math", "__future__", "collections", "typing", "itertools")
        assert allowed or layer(name) == "reference", name


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path):
    for name in imported(path, ("fastdit", "kernels")):
        assert name.split(".")[0] in KERNELS or layer(name) == "kernels", name


def test_tests_and_benchmarks_never_import_each_other():
    tests = {p.stem for p in (ROOT / "tests").glob("*.py")}
    benchmarks = {p.stem for p in (ROOT / "benchmarks").glob("*.py")}
    assert tests and benchmarks
    for here, mine, others in (("tests", tests, benchmarks), ("benchmarks", benchmarks, tests)):
        for path in (ROOT / here).glob("*.py"):
            for name in imported(path, ()):
                first = name.split(".")[0]
                assert first not in ("tests", "benchmarks"), f"{path.name} imports {name}"
                assert first in mine or first not in others, f"{path.name} imports {name}"


def test_the_walk_sees_relative_and_nested_imports(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text("from ..ops import attention\nfrom . import _abi\ndef f():\n    import fastdit.models.dit\n")
    names = imported(path, ("fastdit", "backends", "cpu"))
    assert names == ["fastdit.backends.ops.attention", "fastdit.backends.cpu._abi", "fastdit.models.dit"]
    assert layer("fastdit.models.dit") == "models" and layer("torch.nn") is None and layer("fastdit.accelerate") == ""


def test_compiled_modules_never_see_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            for line in path.read_text(encoding="utf-8").splitlines():
                assert not (line.startswith("#include") and ("torch" in line or "ATen" in line)), f"{path}: {line}"
