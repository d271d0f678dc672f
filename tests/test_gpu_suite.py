"""The GPU suite as far as it can be held without a GPU: rows that fit their ops, peers that compute the same thing."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastdit import ops
from fastdit.cli import app
from fastdit.reference import attention as reference
from fastdit.testing import bench, close, gpu, pytests
from fastdit.testing.workloads import Maker

ROOT = Path(__file__).resolve().parent.parent
ROWS = gpu.rows()


class Meta(Maker):
    """Shapes without memory: the rows are as large as the models."""

    def randn(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row_fits_its_op(row):
    args, kwargs = row.make(Meta(torch.bfloat16))
    inspect.signature(getattr(ops, row.op)).bind(*args, **kwargs)
    assert all(d in row.dtypes for d in gpu.BF16) and row.moved(torch.bfloat16, "fwd") > 0
    assert row.judged is None or row.judged.op == row.op
    for name, peer in (row.peers or {}).items():
        parameters = inspect.signature(peer).parameters
        assert name != "eager" or set(kwargs) <= set(parameters) or "_" in parameters, name


def test_every_op_with_a_bar_has_rows():
    assert {row.op for row in ROWS} >= {
        "norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "attention", "attention_varlen",
        "causal_conv3d", "patch_embed3d", "unpatchify3d", "activation", "norm_silu",
    }  # fmt: skip
    assert len({(row.op, row.model) for row in ROWS}) == len(ROWS)
    assert bench.cases("attention", "gpu")[0][0].model == "Wan2.1-1.3B-480p"


def test_all_pairs_and_flash_are_attention():
    q, k, v = (torch.randn(2, 6, 3, 16) for _ in range(3))
    truth = ops.attention(q.double(), k.double(), v.double(), backend="reference")
    baseline = ops.attention(q, k, v, backend="reference")
    for peer in (gpu._all_pairs, gpu._sdpa(gpu._SDPA["sdpa_flash"])):
        close.assert_close(peer(q, k, v), truth, baseline, "peer")


def test_frames_rule_is_the_mask():
    rule = gpu._frames(frame_tokens=3)
    i, j = torch.arange(9)[:, None], torch.arange(9)[None]
    assert torch.equal(rule(0, 0, i, j), reference.visible_dense(9, 9, None, 3, "cpu").reshape(9, 9))


@pytest.mark.parametrize("cache", [None, 1, 2])
@pytest.mark.parametrize("layout", gpu.conv_peers())
def test_convolution_alone_is_the_convolution(layout, cache):
    x, weight, bias = torch.randn(1, 4, 2, 5, 6), torch.randn(3, 4, 3, 3, 3), torch.randn(3)
    kept = None if cache is None else torch.randn(1, 4, cache, 5, 6)
    expected = ops.causal_conv3d(x, weight, bias, cache=kept, backend="reference")
    actual = gpu.conv_peers()[layout](x, weight, bias=bias, cache=kept, norm="channel_l2", act="silu")
    torch.testing.assert_close(actual, expected)


def test_inputs_drawn_on_the_device():
    a, b = gpu.OnDevice(torch.bfloat16, "cpu"), gpu.OnDevice(torch.bfloat16, "cpu")
    x = a.randn(300, 300)
    assert x.dtype == torch.bfloat16 and torch.equal(x, b.randn(300, 300))
    assert not torch.equal(x, a.randn(300, 300)) and a.randn(2, dtype=torch.float64).dtype == torch.float64


def test_time_limit_names_what_it_leaves_out():
    result = CliRunner().invoke(app, ["bench", "--suite", "smoke", "--op", "norm_modulate", "--budget", "0"])
    assert result.exit_code == 0 and "not measured within 0 s: norm_modulate-DiT-XL/2-256 fwd" in result.output


def test_sanitizer_picks_tests_of_every_cuda_family():
    pytest.importorskip("fastdit._cuda_sim")
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_*_cuda.py"))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files, "-k", pytests.CUDA_SAMPLES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = dict(re.findall(r"tests/(test_\w+)\.py: (\d+)", done.stdout))
    assert set(found) == {Path(f).stem for f in files} and sum(map(int, found.values())) <= 12, done.stdout


def test_make_gpu_says_that_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [ROOT / ".ci" / "gpu"],
        env={"FASTDIT_PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "torch sees no NVIDIA GPU" in done.stdout
