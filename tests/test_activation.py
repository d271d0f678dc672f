"""activation: its range, and every check of its input."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import fastdit
from fastdit import ops
from fastdit.reference.activation import ACTS
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, Sample


@pytest.mark.parametrize("act", ACTS)
def test_whole_range(act, isa):
    """Small, usual and large arguments, each judged by itself; infinity and NaN."""
    usual = torch.linspace(-12, 12, 20001)
    octaves = 2.0 ** torch.arange(-100, 100).float() * torch.linspace(1, 1.99, 33)[:, None]
    for name, x in (("usual", usual), ("small", octaves[octaves < 0.1]), ("large", octaves[octaves > 16])):
        for signed in (x, -x):
            truth = ops.activation(signed.double(), act, backend="reference")
            baseline = ops.activation(signed, act, backend="reference")
            close.assert_close(ops.activation(signed, act, backend="cpu"), truth, baseline, f"{act} {name}")
    special = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    close.assert_bitwise(ops.activation(special, act, backend="cpu"), special)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.integers(0, 3), min_size=0, max_size=3),
    channels=st.integers(1, 70),
    act=st.sampled_from(ACTS),
    gated=st.booleans(),
    step=st.integers(1, 2),
    dtype=st.sampled_from(contract.DTYPES),
)
def test_any_shape_and_stride(isa, rows, channels, act, gated, step, dtype):
    def make(m: Maker):
        parts = m.randn(*(n * step for n in rows), 2 * channels)[tuple(slice(None, None, step) for _ in rows)]
        x, up = parts.chunk(2, dim=-1)
        return (x, act), dict(up=up if gated else None)

    if torch.Size((*rows, channels)).numel() < 64:
        dtype = torch.bfloat16  # whether fp32 rounds a few numbers as well as torch does is luck
    sample = Sample("activation", "fuzz", make)
    contract.forward(sample, dtype, "cpu")
    contract.backward(sample, dtype, "cpu")


def test_outputs_past_the_caches():
    """Larger than the last-level cache: the streaming stores, and their last rows."""
    x = torch.randn(33, 2**20 + 32).bfloat16()
    for act in ("gelu_tanh", "silu"):
        y = ops.activation(x, act)
        close.assert_close(y[-1], ops.activation(x[-1].double(), act), ops.activation(x[-1], act, backend="reference"))


X = torch.randn(2, 4, 8)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: ops.activation([1.0]), TypeError, "x must be a tensor; got list"),
        (lambda: ops.activation(X.int()), TypeError, "got int32, expected float32"),
        (lambda: ops.activation(torch.tensor(1.0)), ValueError, "x has no channels"),
        (lambda: ops.activation(X[..., :0]), ValueError, "x has no channels"),
        (lambda: ops.activation(X.transpose(1, 2)), ValueError, "last dim of x must be contiguous"),
        (lambda: ops.activation(X, "swish"), ValueError, "act is unknown; got 'swish'"),
        (lambda: ops.activation(X, up=X[:1]), ValueError, "two halves of one projection"),
        (lambda: ops.activation(X, up=X.bfloat16()), ValueError, r"bfloat16, expected the same"),
        (lambda: ops.activation(X, up=X.to("meta")), ValueError, "up is on another device"),
        (lambda: ops.activation(X, up=X.transpose(0, 1).transpose(1, 2)), ValueError, "last dim of up"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("name", ["geglu", "swiglu", "gelu"])
def test_accelerate_takes_the_feed_forward(name):
    from diffusers.models.attention import FeedForward

    mlp, x = FeedForward(24, activation_fn=name), torch.randn(2, 5, 24)
    before = mlp(x)
    assert fastdit.accelerate(mlp).replaced == 0  # in no block that is known
    report = fastdit.accelerate(mlp.net[0])
    assert [row.layer for row in report.rows if row.replaced] == ["feed-forward activation"]
    truth = copy.deepcopy(mlp).double()
    fastdit.restore(truth)
    close.assert_close(mlp(x), truth(x.double()), before)
    fastdit.restore(mlp)
    close.assert_bitwise(mlp(x), before)
