"""One family, one basename, in every place; files that can be read in one sitting; no traces of a machine."""

import re
import subprocess
from pathlib import Path

import pytest

from fastdit.testing.workloads import COMPOSED as COMPOSITIONS, FAMILIES

ROOT = Path(__file__).resolve().parent.parent

# Places where every family stands, and those where families arrive one by one.
COMPLETE = {
    "ops": ("python/fastdit/ops", "{}.py"),
    "reference": ("python/fastdit/reference", "{}.py"),
    "reference adapter": ("python/fastdit/backends/reference", "{}.py"),
    "cpu adapter": ("python/fastdit/backends/cpu", "{}.py"),
    "parameters": ("csrc/include/fastdit", "{}.h"),
    "cpu kernel": ("csrc/cpu", "{}.cpp"),
    "binding": ("csrc/bindings/cpu", "{}.cpp"),
    "workloads": ("python/fastdit/testing/workloads", "{}.py"),
    "test": ("tests", "test_{}.py"),
    "benchmark": ("benchmarks", "bench_{}.py"),
}
GROWING = {
    "triton kernel": ("kernels", "{}.py"),
    "cuda kernel": ("csrc/cuda", "{}.cu"),
    "triton adapter": ("python/fastdit/backends/triton", "{}.py"),
    "cuda adapter": ("python/fastdit/backends/cuda", "{}.py"),
}
# Where compositions of families stand that have fused kernels of their own.
COMPOSED = {
    *("ops", "reference", "reference adapter", "triton kernel", "triton adapter"),
    *("workloads", "test", "benchmark"),
}
# Files of these places that belong to no family.
SHARED = {
    "parameters": {"dtype", "isa"},
    "cpu kernel": {"isa"},
    "benchmark": {"memory", "models", "training"},
}  # fmt: skip
# Lines. A file that outgrows its budget is split into <family>_<part>, not squeezed.
BUDGETS = {
    "python/fastdit/ops/*.py": 340,
    "python/fastdit/reference/*.py": 300,
    "python/fastdit/models/*.py": 370,
    "python/fastdit/data/*.py": 300,
    "python/fastdit/diffusion/*.py": 300,
    "python/fastdit/training/*.py": 300,
    "python/fastdit/generation/*.py": 300,
    "python/fastdit/cli/*.py": 200,
    "python/fastdit/demo/*.py": 250,
    "python/fastdit/testing/*.py": 350,
    "python/fastdit/backends/**/*.py": 300,
    "python/fastdit/integrations/*.py": 350,
    "csrc/cpu/*.cpp": 500,
    "csrc/cpu/*.h": 500,
    "csrc/cuda/**/*.cu*": 500,
    "csrc/cuda/**/*.h": 500,
    "csrc/cuda/**/*.cpp": 500,
    "csrc/bindings/**/*.cpp": 200,
    "kernels/*.py": 400,
    "Makefile": 120,
    "CMakeLists.txt": 100,
}


def tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


def families_in(place: tuple[str, str]) -> set[str]:
    folder, pattern = place
    prefix, suffix = pattern.split("{}")
    names = {p.name for p in (ROOT / folder).glob(pattern.format("*")) if not p.name.startswith("_")}
    return {name[len(prefix) : len(name) - len(suffix)] for name in names}


def family_of(stem: str) -> str | None:
    return next((f for f in (*FAMILIES, *COMPOSITIONS) if stem == f or stem.startswith(f"{f}_")), None)


@pytest.mark.parametrize("place", COMPLETE)
def test_every_family_stands_here(place):
    missing = set(FAMILIES) - families_in(COMPLETE[place])
    assert not missing, f"{place}: no {COMPLETE[place][0]}/{COMPLETE[place][1]} for {sorted(missing)}"


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_stand_in_their_places(name):
    places = {**COMPLETE, **GROWING}
    found = {place for place in places if name in families_in(places[place])}
    assert found == COMPOSED


@pytest.mark.parametrize("place", sorted({*COMPLETE, *GROWING} - {"test"}))
def test_nothing_here_but_families(place):
    stems = families_in({**COMPLETE, **GROWING}[place])
    strays = {s for s in stems if family_of(s) is None} - SHARED.get(place, set())
    assert not strays, f"{place}: {sorted(strays)} belong to no family; name them <family>_<part> or list them here"


@pytest.mark.parametrize("pattern", BUDGETS)
def test_files_can_be_read_in_one_sitting(pattern):
    long = {p.name: n for p in ROOT.glob(pattern) if (n := len(p.read_text("utf-8").splitlines())) > BUDGETS[pattern]}
    assert not long, f"over {BUDGETS[pattern]} lines: {long}"


def test_no_path_of_a_machine():
    """Absolute paths of somebody's machine and package hosts have no place in what is shipped."""
    roots = "|".join(("work", "tmp", "opt", "root", "home", "mnt", "Users"))
    path = re.compile(rf"(?<![\w.~$){{}}*-])/(?:{roots})/\w")
    host = re.compile("|".join(("py" + r"pi\.org", r"pythonhosted\.", r"download\.py" + "torch")))
    for file in tracked():
        if file.suffix in (".png", ".mp4", ".safetensors") or file.name == "LICENSE":
            continue
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            assert not path.search(line) and not host.search(line), f"{file.relative_to(ROOT)}:{number}: {line.strip()}"


def test_tracked_files_are_small():
    shipped = ROOT / "python" / "fastdit" / "checkpoints"
    weights = [p for p in tracked() if p.is_relative_to(shipped)]
    assert sum(p.stat().st_size for p in weights) <= 10_000_000, "the shipped checkpoint has 10 MB in all"
    others = set(tracked()) - set(weights)
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in others if p.stat().st_size > 400_000}
    assert not large, f"generated or binary files do not belong here: {large}"
