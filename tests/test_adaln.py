"""adaln_attention and adaln_mlp: the compositions against a block written out in PyTorch, and every check."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fastdit import ops
from fastdit.testing import close

B, N, C, H = 2, 10, 48, 4
BOTH = pytest.mark.parametrize("backend", ["cpu", "reference"])


class Block(nn.Module):
    """facebookresearch/DiT's block, eager."""

    def __init__(self, kv_heads: int = H):
        super().__init__()
        self.kv_heads, dim = kv_heads, C // H
        self.qkv, self.proj = nn.Linear(C, (H + 2 * kv_heads) * dim), nn.Linear(C, C)
        self.fc1, self.fc2 = nn.Linear(C, 3 * C), nn.Linear(3 * C, C)
        self.q_norm = nn.Parameter(torch.rand(dim) + 0.5)

    @staticmethod
    def modulated(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def attention(self, x, shift, scale, gate, norm=False):
        y = self.qkv(self.modulated(x, shift, scale)).unflatten(-1, (H + 2 * self.kv_heads, -1)).transpose(1, 2)
        q, k, v = y.split([H, self.kv_heads, self.kv_heads], dim=1)
        if norm:
            q, k = (F.rms_norm(t, t.shape[-1:], self.q_norm, 1e-6) for t in (q, k))
        o = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(-2)
        return x + gate.unsqueeze(1) * self.proj(o)

    def mlp(self, x, shift, scale, gate):
        hidden = F.gelu(self.fc1(self.modulated(x, shift, scale)), approximate="tanh")
        return x + gate.unsqueeze(1) * self.fc2(hidden)


def _inputs(dtype=torch.float32, kv_heads=H):
    block = Block(kv_heads).to(dtype)
    return block, torch.randn(B, N, C, dtype=dtype), torch.randn(B, 3 * C, dtype=dtype).chunk(3, dim=-1)


def _tables(tables):
    return dict(zip(("shift", "scale", "gate"), tables, strict=True))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads, norm", [(H, False), (H, True), (2, True)])
def test_attention_half(kv_heads, norm, dtype, backend):
    block, x, tables = _inputs(dtype, kv_heads)
    extra = dict(qk_norm="rms", q_weight=block.q_norm, k_weight=block.q_norm) if norm else {}
    with torch.no_grad():
        truth = copy.deepcopy(block).double().attention(x.double(), *(t.double() for t in tables), norm)
        y = ops.adaln_attention(
            x, **_tables(tables), qkv=block.qkv, proj=block.proj, num_heads=H, num_kv_heads=kv_heads, backend=backend,
            precision="native" if dtype is torch.bfloat16 else "fp32", **extra,
        )  # fmt: skip
        close.assert_close(y, truth, block.attention(x, *tables, norm))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mlp_half(dtype, backend):
    block, x, tables = _inputs(dtype)
    with torch.no_grad():
        truth = copy.deepcopy(block).double().mlp(x.double(), *(t.double() for t in tables))
        y = ops.adaln_mlp(x, **_tables(tables), fc1=block.fc1, fc2=block.fc2, backend=backend)
        close.assert_close(y, truth, block.mlp(x, *tables))


@BOTH
def test_pairs_equal_callables(backend):
    block, x, tables = _inputs()
    by_call = dict(qkv=block.qkv, proj=block.proj), dict(fc1=block.fc1, fc2=block.fc2)
    by_pair = [{name: (layer.weight, layer.bias) for name, layer in half.items()} for half in by_call]
    for i in (0, 1):
        op, heads = ((ops.adaln_attention, dict(num_heads=H)), (ops.adaln_mlp, {}))[i]
        kwargs = _tables(tables) | heads | dict(backend=backend)
        close.assert_bitwise(op(x, **kwargs, **by_call[i]), op(x, **kwargs, **by_pair[i]))


def test_layers_are_called_not_read():
    """A hooked or quantised layer must run through its own forward, once."""
    block, x, tables = _inputs()
    seen = []
    for name in ("qkv", "proj", "fc1", "fc2"):
        getattr(block, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    x = ops.adaln_attention(x, **_tables(tables), qkv=block.qkv, proj=block.proj, num_heads=H)
    ops.adaln_mlp(x, **_tables(tables), fc1=block.fc1, fc2=block.fc2)
    assert seen == ["qkv", "proj", "fc1", "fc2"]


@BOTH
def test_packed_equals_one_by_one(backend):
    block, _, _ = _inputs()
    lengths = (3, 1, 6)
    x, tables = torch.randn(10, C), torch.randn(3, 3 * C).chunk(3, dim=-1)
    rope = torch.randn(10, 1, C // H // 2)
    cu = torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    rows = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).int()
    layers = dict(qkv=block.qkv, proj=block.proj, num_heads=H, backend=backend)
    with torch.no_grad():
        y = ops.adaln_attention(
            x, **_tables(tables), **layers, row_index=rows, cu_seqlens=cu, max_seqlen=6, cos=rope.cos(), sin=rope.sin()
        )
        for i, (a, b) in enumerate(((0, 3), (3, 4), (4, 10))):
            own = {name: t[i : i + 1] for name, t in _tables(tables).items()}
            angles = dict(cos=rope[a:b].cos(), sin=rope[a:b].sin())
            one = ops.adaln_attention(x[None, a:b], **own, **layers, **angles)
            wide = ops.adaln_attention(
                x[None, a:b].double(), **{n: t.double() for n, t in own.items()}, **angles,
                **layers | dict(qkv=copy.deepcopy(block.qkv).double(), proj=copy.deepcopy(block.proj).double()),
            )  # fmt: skip
            close.assert_close(y[None, a:b], wide, one)


@BOTH
def test_gradients(backend):
    block, x, tables = _inputs(torch.float64)
    leaves = [x, *tables]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]

    def run(op):
        y = op(leaves[0], leaves[1:])
        return torch.autograd.grad(y.pow(2).sum(), [*leaves, *block.parameters()], allow_unused=True)

    def ours(x, tables):
        named = _tables(tables) | dict(backend=backend)
        y = ops.adaln_attention(x, **named, qkv=block.qkv, proj=block.proj, num_heads=H)
        return ops.adaln_mlp(y, **named, fc1=block.fc1, fc2=block.fc2)

    expected = run(lambda x, t: block.mlp(block.attention(x, *t), *t))
    for a, e in zip(run(ours), expected, strict=True):
        if e is not None:
            close.assert_close(a.float(), e, e.float())


@BOTH
def test_compile_fullgraph_over_lengths(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    block, _, tables = _inputs()
    counter = CompileCounterWithBackend("aot_eager")

    def call(x):
        named = _tables(tables) | dict(backend=backend)
        x = ops.adaln_attention(x, **named, qkv=block.qkv, proj=block.proj, num_heads=H)
        return ops.adaln_mlp(x, **named, fc1=block.fc1, fc2=block.fc2)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for n in (6, 8, 12):
        x = torch.randn(B, n, C)
        with torch.no_grad():
            close.assert_bitwise(compiled(x), call(x))
    assert counter.frame_count <= 2


X, T = torch.randn(B, N, C), torch.randn(B, C)
LINEAR = nn.Linear(C, C)
GOOD = dict(x=X, shift=T, scale=T, gate=T, qkv=nn.Linear(C, 3 * C), proj=LINEAR, num_heads=H)
BOUNDS = torch.tensor([0, N], dtype=torch.int32)
BAD = {
    "qkv-none": (dict(qkv=None), TypeError, "qkv must be a callable"),
    "proj-triple": (dict(proj=(T, T, T)), TypeError, "proj must be a callable"),
    "qkv-width": (dict(qkv=nn.Linear(C, 3 * C + 1)), ValueError, "qkv gave the wrong shape"),
    "proj-width": (dict(proj=nn.Linear(C, C + 1)), ValueError, "proj gave the wrong shape"),
    "heads": (dict(num_heads=0), ValueError, "head counts"),
    "kv-heads": (dict(num_kv_heads=0), ValueError, "head counts"),
    "packed-dense": (dict(cu_seqlens=BOUNDS, max_seqlen=N), ValueError, "come together"),
    "packed-x": (dict(x=X[0]), ValueError, "come together"),
    "packed-max": (dict(x=X[0], cu_seqlens=BOUNDS), ValueError, "come together"),
    "packed-kv-len": (dict(x=X[0], cu_seqlens=BOUNDS, max_seqlen=N, kv_len=BOUNDS[1:]), ValueError, "kv_len is for"),
    "dense-window": (dict(window=(1, 1, 1)), ValueError, "window is for packed"),
    "table": (dict(scale=T[:, :-1]), ValueError, "norm_modulate: scale"),
    "gate": (dict(gate=torch.randn(B + 1, C)), ValueError, "gate_residual: gate"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_attention_half(case):
    kwargs, error, match = BAD[case]
    with pytest.raises(error, match=match) as caught:
        ops.adaln_attention(**{**GOOD, **kwargs})
    assert "got" in str(caught.value)


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        (dict(fc1=3), TypeError, "fc1 must be a callable"),
        (dict(fc2=nn.Linear(C, 7)), ValueError, "fc2 gave the wrong shape"),
        (dict(act="swish"), ValueError, "act is unknown"),
        (dict(shift=T[:, :-1]), ValueError, "norm_modulate: shift"),
    ],
)
def test_bad_input_mlp_half(kwargs, error, match):
    with pytest.raises(error, match=match):
        ops.adaln_mlp(**{**dict(x=X, shift=T, scale=T, gate=T, fc1=LINEAR, fc2=LINEAR), **kwargs})
