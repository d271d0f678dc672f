"""The wheel, built from this tree and used outside it: what is inside, and that it works without the sources."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import pathlib, torch, fastdit, fastdit.kernels
from fastdit import _cpu, ops
place = pathlib.Path(fastdit.__file__).parent
assert place.is_relative_to(EXPECTED), place
assert pathlib.Path(_cpu.__file__).parent == place and pathlib.Path(fastdit.kernels.__file__).parent.parent == place
for name in ("tests", "csrc", "benchmarks"):
    try:
        __import__(f"fastdit.{name}")
    except ImportError:
        continue
    raise AssertionError(f"fastdit.{name} can be imported")
x, table = torch.randn(2, 8, 72), torch.randn(2, 72)
expected = torch.nn.functional.layer_norm(x, (72,), eps=1e-6) * (1 + table[:, None]) + table[:, None]
assert (ops.norm_modulate(x, shift=table, scale=table, backend="cpu") - expected).abs().max() < 1e-5
print("works")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """FASTDIT_WHEEL, or a wheel built here (it reuses the objects of the editable install's build folder)."""
    if given := os.environ.get("FASTDIT_WHEEL"):
        return Path(given).resolve()
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("fastdit-*.whl"))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"fastdit"}
    kernels = {p.name for p in (ROOT / "kernels").glob("*.py")} | {"__init__.py"}
    assert {n.removeprefix("fastdit/kernels/") for n in names if n.startswith("fastdit/kernels/")} == kernels
    assert sum(n.startswith("fastdit/_cpu.") and n.endswith(".so") for n in names) == 1
    assert not any("_cuda_sim" in n for n in names)  # a tool of the tests
    assert any(n.endswith("licenses/LICENSE") for n in names)
    packed = {n for n in names if n.endswith(".py") and not n.startswith("fastdit/kernels/")}
    sources = {f"fastdit/{p.relative_to(ROOT / 'python/fastdit')}" for p in (ROOT / "python/fastdit").rglob("*.py")}
    assert packed == {s for s in sources if not s.startswith("fastdit/kernels/")}
    package = ROOT / "python/fastdit"
    data = [
        p for suffix in ("toml", "json", "safetensors") for p in package.rglob(f"*.{suffix}")
    ]  # configs, checkpoint
    assert data and {f"fastdit/{p.relative_to(package)}" for p in data} <= set(names)


def test_no_library_is_grafted(wheel, tmp_path):
    """One OpenMP pool per process: the module takes libgomp from torch or the system, and never sees libtorch."""
    module = next(n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("fastdit/_cpu."))
    linked = subprocess.run(["ldd", zipfile.ZipFile(wheel).extract(module, tmp_path)], capture_output=True, text=True)
    assert "libgomp.so.1" in linked.stdout and "torch" not in linked.stdout and "python" not in linked.stdout
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if "libgomp" in n or ".libs/" in n]


def test_works_outside_the_tree(wheel, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(where, text=True).strip())
    # torch and the rest come from the environment that runs the tests; a path in a .pth file runs no .pth of its own,
    # so the editable install of this tree stays invisible
    paths = dict.fromkeys([sysconfig.get_path("purelib"), kept_torch()])
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    zipfile.ZipFile(wheel).extractall(site)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTDIT_BACKEND")}
    run = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = subprocess.run([python, "-c", PROBE.replace("EXPECTED", repr(str(site)))], **run)
    assert done.returncode == 0 and done.stdout.strip() == "works", done.stderr
    done = subprocess.run([python, "-m", "fastdit", "verify", "--op", "norm_modulate", "--backend", "cpu"], **run)
    assert done.returncode == 0, done.stdout + done.stderr
    words = ["generate", "a red circle moving right on a blue background", "--out", "clip.mp4", "--steps", "2"]
    done = subprocess.run([python, "-m", "fastdit", *words], **run)
    assert done.returncode == 0 and (tmp_path / "clip.mp4").stat().st_size > 0, done.stdout + done.stderr


def kept_torch() -> str:
    """Where torch itself lives (`make setup TORCH=keep` takes it from another environment)."""
    import torch

    return str(Path(torch.__file__).parent.parent)
