"""The command line: help that teaches, true answers, exit statuses, and files in the promised form."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fastdit.backends import _facts, registry
from fastdit.cli import app
from fastdit.data import media
from fastdit.demo import models, opclock
from fastdit.testing import bench
from fastdit.testing.models import twin

COMMANDS = ("info", "verify", "bench", "demo", "generate")
ROW = ["op", "model", "shape", "dtype", "pass", "backend", "peer", "time_ms", "peer_ms", "ratio", "pct_ceiling",
       "err_ratio"]  # fmt: skip
PEERS = {"eager", "compile", "copy", "gemm", "sdpa", "sdpa_flash", "sdpa_cudnn", "flex", "torch_varlen", "fa2", "fa3",
         "fa4", "liger", "quack", "conv_ncdhw", "conv_ndhwc", "cudnn_ncdhw", "cudnn_ndhwc", "linear_rewrite", "padded",
         "two_kernels"}  # fmt: skip


def call(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))


@pytest.fixture
def broken(monkeypatch):
    """norm_modulate on the CPU backend, wrong by two per cent."""
    impl = registry.get("norm_modulate", "cpu")
    wrong = dataclasses.replace(impl, forward=lambda *args: impl.forward(*args) * 1.02)
    monkeypatch.setitem(registry._impls["norm_modulate"], "cpu", wrong)
    _facts.forget()
    yield
    _facts.forget()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command):
    done = call(command, "--help")
    assert done.exit_code == 0 and f"fastdit {command}" in done.output and "Example" in done.output


def test_top_help_lists_the_commands():
    done = call("--help")
    assert done.exit_code == 0 and all(name in done.output for name in COMMANDS)


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "fastdit", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)


def test_info():
    done = call("info")
    assert done.exit_code == 0
    for expected in (torch.__version__, str(torch.get_num_threads()), *registry.BACKENDS, *registry.ops()):
        assert expected in done.output
    if not torch.cuda.is_available():
        assert "none: " in done.output


def test_verify_passes_and_counts():
    done = call("verify", "--op", "norm_modulate", "--backend", "cpu", "--no-backward")
    assert done.exit_code == 0 and "all passed" in done.output
    assert all(dtype in done.output for dtype in ("float32", "bfloat16", "float16"))


def test_verify_finds_a_fault(broken):
    done = call("verify", "--op", "norm_modulate", "--no-backward")
    assert done.exit_code == 1 and "FAILED" in done.output and "of the allowed error" in done.output


@pytest.mark.parametrize("arguments", [("--op", "nonsense"), ("--backend", "nonsense")])
def test_verify_refuses_what_it_does_not_know(arguments):
    done = call("verify", *arguments)
    assert done.exit_code == 2 and "nonsense" in done.output and "norm_modulate" in done.output


def test_bench_writes_the_promised_rows(tmp_path):
    json_file, html_file = tmp_path / "b.json", tmp_path / "b.html"
    files = ("--json", json_file, "--html", html_file)
    done = call("bench", "--suite", "smoke", "--op", "norm_modulate", "--rounds", 1, *files)
    assert done.exit_code == 0, done.output
    document = json.loads(json_file.read_text())
    assert list(document) == ["machine", "ceilings", "rows"] and document["ceilings"]["copy_gb_per_s"] > 0
    assert {row["peer"] for row in document["rows"]} == {"eager", "copy"}
    for row in document["rows"]:
        assert list(row) == ROW and row["peer"] in PEERS and row["backend"] in registry.BACKENDS
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["time_ms"])
        assert 0 <= row["err_ratio"] <= 1 and row["time_ms"] > 0
    self_contained(html_file.read_text())


def test_bench_passes(tmp_path):
    file = tmp_path / "b.json"
    done = call("bench", "--suite", "smoke", "--op", "gate_residual_norm_modulate", "--rounds", 1, "--pass", "bwd",
                "--pass", "fwd+bwd", "--json", file)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {row["pass"] for row in json.loads(file.read_text())["rows"]} == {"bwd", "fwd+bwd"}


def test_bench_does_not_time_wrong_results(broken, tmp_path):
    file = tmp_path / "b.json"
    done = call("bench", "--suite", "smoke", "--op", "norm_modulate", "--json", file)
    assert (
        done.exit_code == 1
        and "wrong or failed, not timed:" in done.output
        and json.loads(file.read_text())["rows"] == []
    )


def test_bench_is_not_fooled_by_a_wrong_peer(broken):
    workload, dtype = bench.cases("norm_modulate", "smoke")[0]
    fooled = dataclasses.replace(workload, peers={"eager": lambda x, **tables: x * 0 + 100})
    with pytest.raises(AssertionError, match="of the allowed error"):
        bench.measure(fooled, dtype, bench.Settings(rounds=1, compiled=False))


@pytest.mark.parametrize("arguments", [("--suite", "nonsense"), ("--op", "nonsense"), ("--pass", "nonsense")])
def test_bench_refuses_what_it_does_not_know(arguments):
    done = call("bench", *arguments)
    assert done.exit_code == 2 and "nonsense" in done.output and "norm_modulate" in done.output


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The small demo, run once."""
    out = tmp_path_factory.mktemp("demo")
    done = call("demo", "--small", "--device", "cpu", "--out", out)
    assert done.exit_code == 0, done.output
    return out, done.output


def test_demo_prints_its_findings(demo):
    output = demo[1]
    for expected in ("speed-up", "where the time goes", "what became of it", "replaced by", "left:", "PSNR"):
        assert expected in output


def test_demo_report_json(demo):
    report = json.loads((demo[0] / "report.json").read_text())
    assert report["agree"] and report["clip"]["frames"] == 49 and report["clip"]["psnr_db"] > 30
    assert [(m["dtype"]) for m in report["models"]] == ["bfloat16", "float32", "bfloat16"]
    for model in report["models"]:
        assert model["eager_s"]["p20"] <= model["eager_s"]["p50"] <= model["eager_s"]["p80"]
        assert model["speedup"] == pytest.approx(model["eager_s"]["p50"] / model["fastdit_s"]["p50"])
        assert 0 < model["errors"]["fastdit"]["rms"] <= model["errors"]["fastdit"]["max"] and model["restored_bitwise"]
        assert any(layer["replaced"] for layer in model["layers"])
        assert all(layer["why"] for layer in model["layers"])
        assert any(o["operator"].startswith("fastdit::") for o in model["operators"]["fastdit"])
        assert not any(o["operator"].startswith("fastdit::") for o in model["operators"]["eager"])


def test_demo_ends_with_a_generated_clip(demo):
    made = json.loads((demo[0] / "report.json").read_text())["generation"]
    assert made["frames"] == 17 and media.read(demo[0] / made["file"]).size == (17, 64, 64)
    asked = {"colour": "red", "shape": "circle", "motion": "right", "background": "blue"}
    assert {name: made["shows"][name] for name in asked} == asked
    assert made["prompt"] in demo[1] and made["prompt"] in (demo[0] / "report.html").read_text()


def test_demo_report_html(demo):
    text = (demo[0] / "report.html").read_text()
    self_contained(text)
    assert text.count("data:image/png;base64,") > 18 and text.count("data:video/mp4;base64,") == 2
    assert text.count("what became of it") == 3


def self_contained(text):
    assert text.startswith("<!doctype html>") and "<table>" in text
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', text)
    assert sources and all(s.startswith("data:") for s in sources)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)


def test_demo_weights_are_seeded_and_alive():
    config = {**models.DIT_XL_2_256, "num_layers": 1, "num_attention_heads": 2, "sample_size": 8}
    first, second = models.dit(config), models.dit(config)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0, name
    other = twin(first)
    assert other is not first and all(a is b for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_opclock_counts_operators():
    with opclock.OpClock("cpu") as clock:
        x = torch.randn(4, 8) @ torch.randn(8, 8)
        torch.nn.functional.silu(x)
    assert clock.calls["aten::mm"] == 1 and clock.calls["aten::silu"] == 1
    split = opclock.by_group(clock, {"gemm": ("linear",), "rest": ()})
    assert split["gemm"] == clock.seconds["aten::mm"]
    assert sum(split.values()) == pytest.approx(sum(clock.seconds.values()))
