"""The fused halves of an adaLN block on the Triton kernels: against the composition in fp64, and the laws of fusing."""

import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.utils._pytree import tree_map

import fastdit
from fastdit import ops
from fastdit.backends import registry
from fastdit.backends.triton import _config, _launch, adaln
from fastdit.backends.triton._config import Config, forced
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, Sample
from fastdit.testing.workloads.adaln import SAMPLES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_card = pytest.mark.gpu if DEVICE == "cuda" else lambda test: test
KERNELS = ("norm_modulate_linear", "linear_gate_residual")
OURS = ("norm_modulate_qkv", *KERNELS)
PARTS = ("norm_modulate", "gate_residual", "activation", "qk_norm_rope", "attention", "attention_varlen")
HOT = [s for s in SAMPLES if s.id in ("rms-rope", "tables-learned", "packed-index", "gelu_tanh")]
# fp16 is bf16's code but for the format of loads and stores
EACH = [
    pytest.param(s, dtype, id=f"{s}-{dtype}", marks=pytest.mark.full if dtype == torch.float16 and s not in HOT else ())
    for s in SAMPLES for dtype in contract.DTYPES
]  # fmt: skip


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """Where a family has no Triton kernel yet, its formula stands between the fused ones."""
    for op in PARTS:
        table = registry._impls[op]
        if "triton" not in table:
            other = table["reference"]
            impl = registry.Impl(op, "triton", other.supports, other.forward, other.backward)
            monkeypatch.setitem(table, "triton", impl)


@pytest.fixture
def small():
    """Tiles that tiny inputs fill: several of them, whole groups of rows, more than one head in each."""
    with forced(KERNELS[0], Config((16, 32, 16), 4, 2)), forced(KERNELS[1], Config((16, 32, 16), 4, 2)):
        yield


@on_card
@pytest.mark.parametrize("sample, dtype", EACH)
def test_forward(sample, dtype, small):
    contract.forward(sample, dtype, "triton", DEVICE)


@on_card
@pytest.mark.parametrize("sample, dtype", EACH)
def test_backward(sample, dtype, small):
    contract.backward(sample, dtype, "triton", DEVICE)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_reference_is_the_composition(sample):
    """The oracle of the internal ops against the parts one by one, with gradients."""
    args, kwargs = sample.make(Maker(torch.float64))

    def run(fused):
        a, k, leaves = contract._leaves(sample, args, kwargs)
        y = getattr(ops, sample.op)(*a, **{**k, "fused": fused}, backend="reference")
        return y, torch.autograd.grad(y.pow(2).sum(), leaves)

    (y, grads), (expected, others) = run(True), run(False)
    close.assert_close(y.float(), expected, expected.float())
    for a, e in zip(grads, others, strict=True):
        close.assert_close(a.float(), e, e.float())


# ---- what auto takes, and what it leaves alone ------------------------------------------------------------
B, N, C, H = 2, 6, 32, 2


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.calls = nn.Linear(C, C), 0

    def forward(self, x):
        self.calls += 1
        return self.base(x)


class Wider(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def _hooked():
    layer = nn.Linear(C, C)
    layer.register_forward_hook(lambda *_: None)
    return layer


def _patched():
    layer = nn.Linear(C, C)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    return layer


def _call(op="adaln_attention", dtype=torch.float16, **changes):
    x, tables = torch.randn(B, N, C, dtype=dtype), torch.randn(B, 3 * C, dtype=dtype).chunk(3, dim=-1)
    kwargs = dict(zip(("shift", "scale", "gate"), tables, strict=True), backend="triton")
    if op == "adaln_attention":
        kwargs |= dict(qkv=nn.Linear(C, 3 * C), proj=nn.Linear(C, C), num_heads=H)
    else:
        kwargs |= dict(fc1=nn.Linear(C, C), fc2=nn.Linear(C, C))
    kwargs |= changes
    kwargs = {k: v.to(dtype) if isinstance(v, nn.Module) else v for k, v in kwargs.items()}
    return getattr(ops, op), (x,), kwargs


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels in the order of their launches."""
    names, run = [], _launch._slow
    monkeypatch.setattr(
        _launch, "_slow", lambda kernel, *rest: (names.append(kernel.fn.__name__), run(kernel, *rest))[1]
    )
    return names


@torch.no_grad()
def test_three_launches_and_two(launched, small):
    op, args, kwargs = _call(fused=True)
    op(*args, **kwargs)
    attention = len(launched) - 2
    assert (launched[0], launched[-1]) == KERNELS
    assert attention == (
        registry.get("attention", "triton").forward is not registry.get("attention", "reference").forward
    )
    launched.clear()
    op, args, kwargs = _call("adaln_mlp", fused=True)
    op(*args, **kwargs)
    assert tuple(launched) == KERNELS


REFUSED = {
    "lora": (dict(proj=LoRA()), "proj is a LoRA: it is called, never read"),
    "subclass": (dict(proj=Wider(C, C)), "proj is a Wider"),
    "hooked": (dict(proj=_hooked()), "proj has hooks or a forward of its own"),
    "patched": (dict(proj=_patched()), "proj has hooks or a forward of its own"),
    "parametrised": (
        dict(proj=nn.utils.parametrizations.weight_norm(nn.Linear(C, C))), "proj is a ParametrizedLinear"
    ),
    "lambda": (dict(qkv=lambda x: torch.cat([x, x, x], -1)), "qkv is a function"),
    "post-norm": (dict(post_norm="rms"), "post_norm needs whole rows"),
    "hidden": (dict(qk_norm="rms", scope="hidden"), "a norm over all heads needs whole rows"),
    "weights": (dict(proj=(torch.randn(C, C), None)), "weight must have x's dtype"),
    "weight-rows": (dict(proj=(torch.randn(C, C).half().t(), None)), "contiguous along its last dim"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_is_more_than_weights_is_composed(case, launched, capsys):
    changes, reason = REFUSED[case]
    op, args, kwargs = _call(**changes)
    with pytest.raises(fastdit.NoBackend, match=f"adaln_attention: fused=True cannot run: .*{reason}"):
        op(*args, **kwargs, fused=True)
    text = fastdit.explain("adaln_attention", *args, **kwargs)
    assert "fused       no: " in text and reason in text and "norm_modulate\n" in text
    if case != "weights":  # which F.linear refuses as well
        with torch.no_grad():
            op(*args, **kwargs)
    assert not set(KERNELS) & set(launched)


def test_lora_is_called():
    layer = LoRA()
    op, args, kwargs = _call("adaln_mlp", fc1=layer)
    op(*args, **kwargs)
    assert layer.calls == 1


@pytest.mark.parametrize("act", [torch.sin, nn.Identity()], ids=["function", "module"])
def test_act_that_is_called(act):
    op, args, kwargs = _call("adaln_mlp", act=act)
    with pytest.raises(fastdit.NoBackend, match="act is a function"):
        op(*args, **kwargs, fused=True)
    op(*args, **kwargs)


def test_no_kernels_here():
    op, args, kwargs = _call(dtype=torch.float32)
    with pytest.raises(fastdit.NoBackend, match="fused=True cannot run: cpu: has no norm_modulate_qkv"):
        op(*args, **{**kwargs, "backend": None}, fused=True)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(fastdit.NoBackend, match="autocast"):
        op(*args, **kwargs, fused=True)


@torch.no_grad()
def test_the_table_decides(launched, small, capsys):
    """Up to the bound fused, above it composed; fp32 and wide models are composed; False always is."""
    op, args, kwargs = _call("adaln_mlp")

    def fused(**changes):
        launched.clear()
        op(*args, **{**kwargs, **changes})
        return KERNELS[0] in launched

    assert fused() and not fused(fused=False)
    assert "fused       chosen: triton" in fastdit.explain("adaln_mlp", *args, **kwargs)
    with forced("adaln", Config((B * N,))):
        assert fused()
    with forced("adaln", Config((B * N - 1,))):
        assert not fused() and fused(fused=True)
        assert f"above {B * N - 1} tokens of {C} channels" in fastdit.explain("adaln_mlp", *args, **kwargs)
    op, args, kwargs = _call("adaln_mlp", dtype=torch.float32)
    assert not fused() and fused(fused=True)
    for channels, bound in ((1536, adaln.ROWS), (1537, 0)):
        assert adaln._bound(torch.empty(0, channels, dtype=torch.bfloat16)) == bound


@pytest.mark.parametrize("half", ["adaln_attention", "adaln_mlp"])
def test_bad_input_is_named_by_its_part(half):
    for changes, match in (
        (dict(shift=torch.randn(B, C - 1).half()), "norm_modulate: shift"),
        (dict(gate=torch.randn(B + 1, C).half()), "gate_residual: gate"),
        (dict(eps=-1.0), "norm_modulate: eps"),
        (dict(gate_act="swish"), "gate_residual: gate_act"),
        (dict(row_index=torch.zeros(B, N)), "norm_modulate: row_index"),
    ):
        op, args, kwargs = _call(half, fused=True, **changes)
        with pytest.raises((ValueError, TypeError), match=match):
            op(*args, **kwargs)
    width = dict(proj=nn.Linear(C, C + 1)) if half == "adaln_attention" else dict(fc2=nn.Linear(C, C + 1))
    op, args, kwargs = _call(half, fused=True, **width)
    with pytest.raises(ValueError, match="gave the wrong shape"):
        op(*args, **kwargs)


def test_bad_heads_are_named_by_their_part():
    cos = torch.ones(N, C // H // 2)
    for changes, match in (
        (dict(qk_norm="l2"), "qk_norm_rope: norm"),
        (dict(q_weight=torch.ones(C // H), cos=cos, sin=cos), "qk_norm_rope: q_weight without a norm"),
        (dict(cos=cos), "qk_norm_rope: cos and sin come together"),
        (dict(cos=cos[:3], sin=cos[:3]), "qk_norm_rope: cos does not broadcast"),
        (dict(cos=cos, sin=cos, rope_start=2), "qk_norm_rope: cos does not broadcast"),
        (dict(cos=cos, sin=cos, layout="quarter"), "qk_norm_rope: layout"),
    ):
        op, args, kwargs = _call(fused=True, **changes)
        with pytest.raises(ValueError, match=match):
            op(*args, **kwargs)


# ---- the ops behind it ------------------------------------------------------------------------------------
@pytest.mark.parametrize("sample", HOT, ids=str)
def test_fast_path_equals_torch_ops(sample, small):
    contract.paths_equal(sample, torch.bfloat16, "triton")


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_opcheck(sample, small):
    def fresh(t, keep):
        return t.detach().clone().requires_grad_(keep and t.requires_grad) if isinstance(t, torch.Tensor) else t

    found = [call for call in contract.torch_calls(sample, "triton") if call[0].name().split("::")[1].startswith(OURS)]
    assert len(found) == 4  # two ops, each way
    for func, args in found:
        keep = "backward" not in func.name()
        torch.library.opcheck(func, tree_map(lambda t, keep=keep: fresh(t, keep), args))


@pytest.mark.full  # the interpreter has one order of programs
@pytest.mark.parametrize("sample", HOT, ids=str)
def test_backward_is_repeatable(sample, small):
    args, kwargs = sample.make(Maker(torch.bfloat16))

    def grads():
        a, k, leaves = contract._leaves(sample, args, kwargs)
        return torch.autograd.grad(getattr(ops, sample.op)(*a, **k, backend="triton").float().sum(), leaves)

    for a, b in zip(grads(), grads(), strict=True):
        close.assert_bitwise(a, b)


def test_the_norm_is_not_saved(small):
    def saved(fused):
        kept = {}
        op, args, kwargs = _call("adaln_mlp", fused=fused)
        args[0].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            out = op(*args, **kwargs)
        return out, sum(t.untyped_storage().nbytes() for t in kept.values())

    (_, ours), (_, parts) = saved(True), saved(False)
    assert ours <= parts - B * N * C * 2


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_compile_fullgraph_over_lengths(grad, small):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    layers = dict(qkv=nn.Linear(C, 3 * C), proj=nn.Linear(C, C)), dict(fc1=nn.Linear(C, C), fc2=nn.Linear(C, C))
    layers = [{k: v.half() for k, v in half.items()} for half in layers]
    weight = layers[0]["qkv"].weight

    def call(x, tables):
        tables = dict(zip(("shift", "scale", "gate"), tables, strict=True))
        x = ops.adaln_attention(x, **tables, **layers[0], num_heads=H, qk_norm="rms", backend="triton")
        return ops.adaln_mlp(x, **tables, **layers[1], backend="triton")

    def run(function, x, tables):
        weight.grad = None
        with torch.set_grad_enabled(grad):
            y = function(x, tables)
        if grad:
            y.float().sum().backward()
        return [y.detach(), *([weight.grad] if grad else [])]

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for n in (6, 8, 12):
        x, tables = torch.randn(B, n, C).half(), torch.randn(B, 3 * C).half().chunk(3, dim=-1)
        for a, b in zip(run(compiled, x, tables), run(call, x, tables), strict=True):
            close.assert_bitwise(a, b)
    assert counter.frame_count <= 2


# ---- laws of the kernels ----------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape(data):
    """Token counts, widths and tiles that do not divide each other, every row map, strided x and weights."""
    draw = data.draw
    batch, n, c, f = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 40)),
        draw(st.integers(8, 70)),
        draw(st.integers(17, 70)),  # of one hidden value the rounding would decide for a whole row
    )
    rows = draw(st.sampled_from(["sample", "token", "index", "none"]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    tile = st.sampled_from([16, 32])
    config = Config((draw(tile), draw(tile), draw(tile)), 4, 2)
    m = Maker(dtype, seed=draw(st.integers(0, 99)))
    x = m.randn(batch, n + 1, c + draw(st.integers(0, 2)))[:, 1:, :c]
    table = {"sample": (batch, 3 * c), "token": (batch, n, 3 * c), "index": (4, 3 * c), "none": (1, 3 * c)}[rows]
    tables = dict(zip(("shift", "scale", "gate"), m.randn(*table).chunk(3, dim=-1), strict=True))
    kwargs = dict(
        fc1=((m.randn(f, 2 * c) / c**0.5)[:, :c], m.randn(f)), fc2=(m.randn(c, f) / f**0.5, None), act="relu",
        row_index=m.randint(0, 4, (batch, n)) if rows == "index" else None, **({} if rows == "none" else tables),
    )  # fmt: skip
    if rows == "none":
        kwargs |= dict(shift=None, scale=None, gate=None)
    sample = Sample("adaln_mlp", "drawn", lambda _: ((x,), dict(kwargs, fused=True)))
    with forced(KERNELS[0], config), forced(KERNELS[1], config):
        contract.forward(sample, dtype, "triton")


@pytest.mark.parametrize("arch", [80, 90])
def test_tiles_of_the_models(arch):
    """The tiles that a card would be given, heads of 72 packed by threes, as one call each."""
    _launch.pretend(arch)
    _config.forget()
    try:
        m = Maker(torch.bfloat16)
        wide = dict(q_weight=m.randn(72), k_weight=m.randn(72), qk_norm="rms", num_heads=4)
        wide |= dict(zip(("cos", "sin"), m.randn(2, 70, 36, dtype=torch.float32), strict=True))
        tables = dict(zip(("shift", "scale", "gate"), m.randn(2, 3 * 64).chunk(3, dim=-1), strict=True))
        layers = dict(qkv=(m.randn(12 * 72, 64) / 8, m.randn(12 * 72)), proj=(m.randn(64, 4 * 72) / 17, m.randn(64)))
        args = (m.randn(2, 70, 64),), dict(**wide, **tables, **layers, layout="half", fused=True)
        contract.forward(Sample("adaln_attention", "72", lambda _: args), torch.bfloat16, "triton")
    finally:
        _launch.pretend(None)
        _config.forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_far_from_zero(dtype, small):
    """A mean of a thousand deviations, a first block that is nothing like the rest, a row without any variance."""
    x = torch.randn(1, 4, 96)
    x[0, 0] += 1000
    x[0, 1, :16] *= 300
    x[0, 2] = 7
    m = Maker(dtype)
    kwargs = dict(shift=None, scale=None, gate=None, fc1=(m.randn(32, 96), None), fc2=(m.randn(96, 32), None))
    sample = Sample("adaln_mlp", "far", lambda _: ((x.to(dtype),), dict(kwargs, fused=True)))
    contract.forward(sample, dtype, "triton")


@torch.no_grad()
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rope_tables_of_any_strides(layout, small):
    """Doubled tables of the models read every other column; sin may be laid out unlike cos."""
    doubled = torch.randn(2, N, C // H)
    cos, sin = doubled[0, :, 0::2], doubled[1, :, 0::2]
    op, args, kwargs = _call(fused=True, layout=layout)
    expected = op(*args, **kwargs, cos=cos.contiguous(), sin=sin.contiguous())
    close.assert_bitwise(op(*args, **kwargs, cos=cos, sin=sin), expected)
    close.assert_bitwise(op(*args, **kwargs, cos=cos, sin=sin.t().contiguous().t()), expected)


@torch.no_grad()
def test_nan_stays_in_its_row(small):
    op, (x,), kwargs = _call("adaln_mlp", fused=True)
    clean = op(x, **kwargs)
    x[1, 3] = float("nan")
    y = op(x, **kwargs)
    assert y[1, 3].isnan().all()
    y[1, 3] = clean[1, 3]
    close.assert_bitwise(y, clean)


@pytest.mark.parametrize("shape", [(0, N), (B, 0)], ids=str)
def test_no_tokens(shape):
    for half in ("adaln_attention", "adaln_mlp"):
        op, _, kwargs = _call(half, fused=True)
        kwargs |= {name: torch.randn(shape[0], C).half() for name in ("shift", "scale", "gate")}
        x = torch.randn(*shape, C).half().requires_grad_()
        y = op(x, **kwargs)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.big
@torch.no_grad()
def test_offsets_beyond_32_bits(small):
    far = torch.empty(2**31 + 2**20, dtype=torch.float16)  # reserved, two rows of it touched
    x = far.as_strided((2, C), (2**31, 1))
    x.copy_(torch.randn(2, C))
    _, _, kwargs = _call("adaln_mlp", fused=True)
    kwargs |= {name: torch.randn(1, C).half() for name in ("shift", "scale", "gate")}
    close.assert_bitwise(ops.adaln_mlp(x, **kwargs), ops.adaln_mlp(x.clone(), **kwargs))
