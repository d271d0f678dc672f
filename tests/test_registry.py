"""Backend choice: explicit never falls back, auto takes the first that can, every refusal has a reason."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import fastdit
from fastdit import ops
from fastdit.backends import registry
from fastdit.backends.triton import _launch

X = torch.randn(2, 4, 8)


def _verdict(text, backend):
    return next(line for line in text.splitlines() if line.strip().startswith(backend))


def test_set_backend():
    try:
        fastdit.set_backend("reference")
        assert "chosen" in _verdict(fastdit.explain("norm_modulate", X), "reference")
    finally:
        fastdit.set_backend(None)
    assert "chosen" in _verdict(fastdit.explain("norm_modulate", X), "cpu")


def test_use_backend_nests_and_is_per_thread():
    seen = []
    with fastdit.use_backend("reference"):
        with fastdit.use_backend("cpu"):
            assert registry.requested(None) == "cpu"
        thread = threading.Thread(target=lambda: seen.append(registry.requested(None)))
        thread.start()
        thread.join()
        assert registry.requested(None) == "reference" and registry.requested("cpu") == "cpu"
    assert seen == [None]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_explicit_choice_never_falls_back(backend, monkeypatch):
    monkeypatch.setattr(_launch, "on_cpu", False)  # as in a process of a user: no GPU, no kernels
    with pytest.raises(fastdit.NoBackend, match=f"backend='{backend}' cannot run it"):
        ops.norm_modulate(X, backend=backend)
    with fastdit.use_backend(backend), pytest.raises(fastdit.NoBackend):
        ops.norm_modulate(X)


@pytest.mark.parametrize("call", [lambda: fastdit.set_backend("gpu"), lambda: fastdit.use_backend("gpu").__enter__()])
def test_unknown_backend(call):
    with pytest.raises(ValueError, match="unknown backend; got 'gpu', expected one of"):
        call()


@pytest.mark.parametrize(
    "value, code",
    [("reference", "chosen"), ("triton", "NoBackend"), ("gpu", "FASTDIT_BACKEND: unknown backend; got 'gpu'")],
)
def test_environment_is_read_at_import(value, code):
    script = (
        "import torch, fastdit\n"
        "try: fastdit.ops.norm_modulate(torch.zeros(1, 2, 8)); fastdit.explain('norm_modulate', torch.zeros(1, 2, 8))\n"
        "except fastdit.NoBackend: print('NoBackend')"
    )
    environment = {**os.environ, "FASTDIT_BACKEND": value, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert code in done.stdout + done.stderr


def test_forced_isa_is_checked():
    """At the first call, and at the next ones as long as it is wrong."""
    script = (
        "import os, torch, fastdit\n"
        "try: fastdit.ops.norm_modulate(torch.zeros(1, 2, 8))\n"
        "except ValueError as error: print(error)\n"
        "os.environ['FASTDIT_CPU_ISA'] = 'AVX2'\n"
        "fastdit.ops.norm_modulate(torch.zeros(1, 2, 8))"
    )
    environment = {**os.environ, "FASTDIT_CPU_ISA": "avx1024"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert "FASTDIT_CPU_ISA: unknown name; got avx1024" in done.stdout
    assert done.returncode != 0 and "FASTDIT_CPU_ISA: unknown name; got AVX2" in done.stderr


def test_compiled_code_follows_use_backend():
    compiled = torch.compile(lambda x: ops.norm_modulate(x), fullgraph=True, backend="eager")
    with fastdit.use_backend("reference"):
        a = compiled(X)
    b = compiled(X)
    assert torch.equal(a, ops.norm_modulate(X, backend="reference"))
    assert torch.equal(b, ops.norm_modulate(X, backend="cpu"))


def test_auto_on_reference_is_logged_once(caplog):
    registry._logged.discard("norm_modulate")
    with caplog.at_level("WARNING", logger="fastdit"):
        for _ in range(3):
            ops.norm_modulate(X.to("meta"))
    found = [r.getMessage() for r in caplog.records if "slow reference backend" in r.getMessage()]
    assert len(found) == 1 and found[0].startswith("norm_modulate runs on")


def test_impl_rejects_unknown_backend():
    with pytest.raises(ValueError, match="Impl: unknown backend"):
        registry.Impl("norm_modulate", "gpu", lambda *a: None, lambda *a: None, lambda *a: None)
    with pytest.raises(ValueError, match="already"):
        registry.register(registry.implementations("norm_modulate")["cpu"])


def test_dense_attention_prefers_the_libraries_on_a_gpu():
    """Until a GPU has measured ours; what they cannot express (kv_len, windows, packed neighbours) stays with ours."""
    on_gpu = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda"))
    dense, packed = (registry.order(op, on_gpu) for op in ("attention", "attention_varlen"))
    assert dense.index("sdpa") < dense.index("triton") and packed.index("triton") < packed.index("sdpa")
    assert dense.index("triton") < dense.index("cuda") and packed.index("triton") < packed.index("cuda")
    assert set(dense) == set(packed) == set(registry.BACKENDS) - {"cpu"}
