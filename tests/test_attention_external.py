"""FlashAttention 2, 3, 4 and torch's varlen as backends: their published signatures, as stubs that use the formula.

On a GPU the libraries that are installed run the same samples.
"""

import math
import types

import pytest
import torch

import fastdit
from fastdit import ops
from fastdit.backends import _external, _facts, registry
from fastdit.backends.flash_attn import attention as flash
from fastdit.backends.sdpa import attention as torch_sdpa
from fastdit.reference import attention as formula
from fastdit.testing import contract
from fastdit.testing.workloads import Maker, samples

FA3, FA3_FWD, FA4, FA2 = flash.LIBRARIES
HALF = (torch.bfloat16, torch.float16)


def _formula(q, k, v, scale, cu=None):
    """o, lse as a library gives them: +inf without keys, rows beyond the last segment never written."""
    if cu is None:
        o, lse = formula.attention(q, k, v, scale=scale, return_lse=True)
        return o, lse.masked_fill(lse == -math.inf, math.inf)
    lengths = dict(cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], max_seqlen_q=cu[2], max_seqlen_k=cu[3])
    o, lse = formula.attention_varlen(q, k, v, **lengths, scale=scale, return_lse=True)
    beyond = torch.arange(q.shape[0]) >= cu[0][-1]
    lse = lse.masked_fill(lse == -math.inf, math.inf).masked_fill(beyond, math.nan)
    return o.masked_fill(beyond[:, None, None], math.nan), lse


class Stub2(types.ModuleType):
    """flash-attn 2.8."""

    @staticmethod
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        o, lse = _formula(q, k, v, softmax_scale)
        return (o, lse.detach(), None) if return_attn_probs else o

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        o, lse = _formula(q, k, v, softmax_scale, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        return (o, lse.detach(), None) if return_attn_probs else o


class Stub3(types.ModuleType):
    """FlashAttention-3, hopper/flash_attn_interface.py."""

    @staticmethod
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        o, lse = _formula(q, k, v, softmax_scale)
        return (o, lse.detach()) if return_attn_probs else o

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        o, lse = _formula(q, k, v, softmax_scale, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        return (o, lse.detach()) if return_attn_probs else o


class Stub3Old(types.ModuleType):
    """Builds before return_attn_probs: lse always."""

    @staticmethod
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, deterministic=False):
        o, lse = _formula(q, k, v, softmax_scale)
        return o, lse.detach()

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        deterministic=False,
    ):  # fmt: skip
        o, lse = _formula(q, k, v, softmax_scale, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        return o, lse.detach()


class Stub4(types.ModuleType):
    """flash-attn-4 4.0.0b36, flash_attn/cute/interface.py."""

    @staticmethod
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        o, lse = _formula(q, k, v, softmax_scale)
        return o, lse if return_lse else None

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None,
        causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None,
        aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None,
        disable_scheduler_metadata=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        o, lse = _formula(q, k, v, softmax_scale, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        return o, lse if return_lse else None


STUBS = {
    "fa2": (FA2, Stub2),
    "fa3": (FA3, Stub3),
    "fa3-old": (FA3, Stub3Old),
    "fa3-fwd": (FA3_FWD, Stub3),
    "fa4": (FA4, Stub4),
}


def _install(patch, libraries, card=(9, 0)):
    """The backend as if these were installed on a machine with this card."""
    for library, stub in libraries:
        patch.setitem(flash.importlib.import_module("sys").modules, library.module, stub(library.module))
    patch.setattr(flash, "installed", lambda: tuple(library for library, _ in libraries))
    patch.setattr(_external, "capability", lambda q: card)
    patch.setattr(registry, "_impls", {op: dict(table) for op, table in registry._impls.items()})
    flash._function.cache_clear()
    if "flash_attn" not in registry._impls["attention"]:
        flash.register()
    _facts.forget()


@pytest.fixture(autouse=True)
def what_was_installed_is_forgotten():
    yield
    _facts.forget()


@pytest.fixture(params=STUBS)
def library(request, monkeypatch):
    _install(monkeypatch, [STUBS[request.param]])
    yield STUBS[request.param][0]
    flash._function.cache_clear()


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """torch 2.13's; lse (tokens, heads) as its page says."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    o, lse = _formula(query, key, value, scale, (cu_seq_q, cu_seq_k, max_q, max_k))
    return (o, lse.detach().T) if return_aux is not None and return_aux.lse else o


@pytest.fixture
def torch_varlen(monkeypatch):
    from torch.nn.attention import varlen

    assert _names(varlen.varlen_attn) >= _names(varlen_attn), "torch's own signature changed: record it again"
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(_external, "capability", lambda q: (9, 0))
    torch_sdpa._varlen.cache_clear()
    _facts.forget()
    yield
    torch_sdpa._varlen.cache_clear()


def _names(function):
    import inspect

    return set(inspect.signature(function).parameters)


def _played(backend: str, check, *dtypes) -> int:
    """Runs the samples that the backend takes; the others must say why not."""
    count = 0
    for sample in (*samples("attention"), *samples("attention_varlen")):
        if backend not in registry.implementations(sample.op):
            continue
        for dtype in dtypes:
            try:
                check(sample, dtype, backend)
                count += 1
            except fastdit.NoBackend as error:
                assert any(w in str(error) for w in ("has no ", "head dims", "gives lse no", "computes", "NVIDIA"))
    return count


def test_forward(library):
    assert _played("flash_attn", contract.forward, *HALF) >= 8


def test_backward(library):
    assert (_played("flash_attn", contract.backward, *HALF) >= 8) == library.backward


def test_torch_varlen(torch_varlen):
    def packed(check):
        return lambda sample, *rest: check(sample, *rest) if sample.op == "attention_varlen" else None

    assert _played("sdpa", packed(contract.forward), *HALF) >= 4
    assert _played("sdpa", packed(contract.backward), *HALF) >= 4


def _pack(m: Maker, keys=(3, 0, 4)):
    """Three segments, one without keys, and two rows of q and k that belong to none."""
    q, k, v = m.randn(9, 4, 16), m.randn(9, 2, 16), m.randn(9, 2, 16)
    bounds = dict(cu_seqlens_q=m.index([0, 3, 5, 7]), cu_seqlens_k=m.index([0, *torch.tensor(keys).cumsum(0).tolist()]))
    return (q, k, v), dict(**bounds, max_seqlen_q=3, max_seqlen_k=4)


@pytest.mark.parametrize("backend", ["flash_attn", "sdpa"])
def test_rows_of_no_segment(backend, monkeypatch, torch_varlen):
    """Without keys, and beyond the last segment, where the library writes nothing: o = 0, lse = -inf, no gradient."""
    if backend == "flash_attn":
        _install(monkeypatch, [STUBS["fa2"]])
    (q, k, v), kwargs = _pack(Maker(torch.bfloat16))
    o, lse = ops.attention_varlen(q, k, v, **kwargs, return_lse=True, backend=backend)
    expected = ops.attention_varlen(q, k, v, **kwargs, return_lse=True, backend="reference")
    torch.testing.assert_close((o, lse), expected)
    assert not o[3:5].any() and not o[7:].any() and (lse[:, 7:] == -math.inf).all()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grads = [
        torch.autograd.grad(ops.attention_varlen(*leaves, **kwargs, backend=b).float().square().sum(), leaves)
        for b in (backend, "reference")
    ]
    torch.testing.assert_close(*grads)
    flash._function.cache_clear()


def test_gradient_of_lse():
    """FlashAttention-4 has it; where it is missing the call is refused, not answered with zeros."""
    m = Maker(torch.bfloat16)
    q, k, v = (m.randn(1, 5, 2, 16).requires_grad_() for _ in "qkv")
    with pytest.MonkeyPatch.context() as patch:
        _install(patch, [STUBS["fa4"]])
        found = []
        for backend in ("flash_attn", "reference"):
            o, lse = ops.attention(q, k, v, return_lse=True, backend=backend)
            found.append(torch.autograd.grad(o.float().sum() + lse.square().sum(), (q, k, v)))
        torch.testing.assert_close(*found)
    with pytest.MonkeyPatch.context() as patch:
        _install(patch, [STUBS["fa2"], STUBS["fa3"]])
        with pytest.raises(fastdit.NoBackend, match="flash_attn gives lse no gradient, flash_attn_interface gives lse"):
            ops.attention(q, k, v, return_lse=True, backend="flash_attn")
        ops.attention(q.detach(), k.detach(), v.detach(), return_lse=True, backend="flash_attn")
    flash._function.cache_clear()


REFUSED = {
    "dtype": (dict(), dict(dtype=torch.float32), (9, 0), "computes float16 and bfloat16"),
    "head-dim": (dict(), dict(D=20), (9, 0), "multiples of 8"),
    "head-dim-of-fa4": (dict(), dict(D=160), (10, 0), "up to 128; got 160"),
    "card": (dict(), dict(), (7, 5), "no kernels for sm_75"),
    "no-card": (dict(), dict(), None, "needs an NVIDIA GPU"),
    "kv-len": (dict(kv_len=torch.tensor([3], dtype=torch.int32)), dict(), (9, 0), "has no kv_len"),
    "frames": (dict(frame_tokens=2), dict(), (9, 0), "has no frame_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_in_explain(case, monkeypatch):
    kwargs, shape, card, match = REFUSED[case]
    _install(monkeypatch, [STUBS["fa4"]], card)
    x = torch.randn(1, 6, 2, shape.get("D", 16)).to(shape.get("dtype", torch.bfloat16))
    with pytest.raises(fastdit.NoBackend, match=match):
        ops.attention(x, x, x, **kwargs, backend="flash_attn")
    assert match in fastdit.explain("attention", x, x, x, **kwargs)


def test_best_library_of_a_card(monkeypatch):
    _install(monkeypatch, [STUBS["fa3"], STUBS["fa4"], STUBS["fa2"]])
    x = torch.randn(1, 6, 2, 16).bfloat16()
    for card, library in (((8, 0), FA2), ((9, 0), FA3), ((10, 0), FA4), ((12, 0), FA4)):
        monkeypatch.setattr(_external, "capability", lambda q, card=card: card)
        assert flash._choose(x, x, x, False)[0] is library


def test_forward_alone(monkeypatch):
    """The wheel without a backward serves inference, and leaves training to the next one."""
    _install(monkeypatch, [STUBS["fa3-fwd"], STUBS["fa4"]])
    x = torch.randn(1, 6, 2, 16).bfloat16()
    assert flash._choose(x, x, x, False)[0] is FA3_FWD
    assert flash._choose(x.requires_grad_(), x, x, False)[0] is FA4
    with torch.no_grad():
        assert flash._choose(x, x, x, False)[0] is FA3_FWD


def test_nothing_to_compute(library):
    m = Maker(torch.bfloat16)
    o, lse = ops.attention(m.randn(1, 4, 2, 16), *(m.randn(1, 0, 2, 16) for _ in "kv"), return_lse=True,
                           backend="flash_attn")  # fmt: skip
    assert not o.any() and (lse == -math.inf).all() and lse.shape == (1, 2, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["flash_attn", "sdpa"])
def test_on_a_gpu(backend):
    if backend == "flash_attn" and not flash.installed():
        pytest.skip("no FlashAttention is installed")
    on_card = lambda check: lambda sample, dtype, name: check(sample, dtype, name, "cuda")  # noqa: E731
    assert _played(backend, on_card(contract.forward), *HALF) >= 4
    assert _played(backend, on_card(contract.backward), *HALF) >= 4
