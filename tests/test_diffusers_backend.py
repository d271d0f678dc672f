"""diffusers' own door: the attention backend "fastdit", before and after `accelerate`."""

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)

import fastdit
from fastdit import ops
from fastdit.integrations import diffusers as door
from fastdit.testing import close, zoo
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.models import cast, randomize

B, N, M, H, D = 2, 11, 13, 4, 24
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
WAN = next(entry for entry in zoo.models() if str(entry) == "WanTransformer3DModel")


@pytest.fixture(autouse=True)
def _door():
    """Registered, and diffusers' own default left behind: `set_attention_backend` changes it for everybody."""
    door.register()
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.fixture
def calls(monkeypatch):
    """How often the entry in the registry called fastdit's attention."""
    seen = []
    monkeypatch.setattr(door, "ops", SimpleNamespace(attention=counted(ops.attention, seen)))
    return seen


def counted(function, seen):
    def call(*args, **kwargs):
        seen.append(kwargs)
        return function(*args, **kwargs)

    return call


def qkv(dtype=torch.float32, kv_heads=H):
    shapes = ((B, N, H, D), (B, M, kv_heads, D), (B, M, kv_heads, D))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def dispatch(q, k, v, backend, **options):
    return dispatch_attention_fn(q, k, v, backend=AttentionBackendName(backend), **options)


# The entry --------------------------------------------------------------------------------------------------------


def test_importing_fastdit_imports_no_diffusers():
    code = "import sys, fastdit; assert not any(m.split('.')[0] == 'diffusers' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_name_is_a_member_like_the_others():
    door.register()  # once more
    member = AttentionBackendName("fastdit")
    assert member is AttentionBackendName.FASTDIT is AttentionBackendName["FASTDIT"]
    assert isinstance(member, AttentionBackendName) and (member.name, member.value) == ("FASTDIT", "fastdit")
    assert [m.value for m in AttentionBackendName].count("fastdit") == 1 and member in AttentionBackendName
    assert list(AttentionBackendName.__members__)[-1] == "FASTDIT" and "fastdit" in repr(member)
    assert pickle.loads(pickle.dumps(member)) is member is copy.deepcopy(member)
    assert _AttentionBackendRegistry.list_backends().count("fastdit") == 1
    assert not _AttentionBackendRegistry._is_context_parallel_available(member)


MASKS = {
    "prefixes": (torch.arange(M) < torch.tensor([[5], [M]])),
    "any keys": torch.arange(M).remainder(3).ne(torch.tensor([[0], [1]])),
    "text first": (torch.arange(M) < 3) | (torch.arange(M) > 7),
}
SHAPES = {
    "BN": lambda m: m.expand(B, M),
    "B1N": lambda m: m.expand(B, M)[:, None],
    "B11N": lambda m: m.expand(B, M)[:, None, None],
    "one for all": lambda m: m.reshape(-1, M)[0],
    "1N": lambda m: m.reshape(-1, M)[:1],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", MASKS)
@each_dtype
def test_masks_of_keys(mask, shape, dtype, calls):
    given = SHAPES[shape](MASKS[mask])
    leaves = qkv(dtype)

    def run(backend, to):
        q, k, v = (t.to(to, copy=True).requires_grad_() for t in leaves)
        wide = given if given.ndim == 4 else given.reshape(-1, 1, 1, M)  # SDPA takes no (B, 1, N)
        out = dispatch(q, k, v, backend, attn_mask=given if backend == "fastdit" else wide)
        out.square().mean().backward()
        return [out.detach(), q.grad, k.grad, v.grad]

    results = run("fastdit", dtype), run("native", torch.float64), run("native", dtype)
    assert calls and calls[0]["kv_len"].dtype == torch.int32
    for actual, truth, baseline in zip(*results, strict=True):
        assert actual.dtype == dtype
        close.assert_close(actual, truth, baseline)


@torch.no_grad()
def test_grouped_heads_scale_and_lse():
    q, k, v = qkv(kv_heads=2)
    options = dict(scale=0.3, enable_gqa=True)
    out = dispatch(q, k, v, "fastdit", **options)
    wide = [t.double() for t in (q, k, v)]
    close.assert_close(out, dispatch(*wide, "native", **options), dispatch(q, k, v, "native", **options))
    again, lse = dispatch(q, k, v, "fastdit", attention_kwargs={"return_lse": True}, **options)
    close.assert_bitwise(again, out)
    close.assert_bitwise(lse, ops.attention(q, k, v, scale=0.3, return_lse=True)[1])
    every_other = [t[..., ::2] for t in (q, k, v)]
    close.assert_bitwise(dispatch(*every_other, "fastdit"), ops.attention(*(t.contiguous() for t in every_other)))


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(dropout_p=0.1), "no dropout; got dropout_p=0.1"),
        (dict(is_causal=True), "no token-causal mask"),
        (dict(attn_mask=torch.zeros(B, 1, 1, M)), r"one of keys alone; got torch.float32 \[2, 1, 1, 13\]"),
        (dict(attn_mask=torch.ones(B, 1, N, M).bool()), r"got torch.bool \[2, 1, 11, 13\], expected bool \[2, 13\]"),
        (dict(attn_mask=torch.ones(N, M).bool()), r"got torch.bool \[11, 13\]"),
        (dict(attn_mask=torch.ones(B, N).bool()), r"got torch.bool \[2, 11\]"),
        (dict(parallel_config=object()), "no context parallelism"),
    ],
)
def test_what_it_does_not_do(options, match):
    with pytest.raises(ValueError, match=match):
        dispatch(*qkv(), "fastdit", **options)


@torch.no_grad()
def test_compiles_once_for_all_lengths():
    run = torch.compile(
        lambda q, k, v, mask: dispatch(q, k, v, "fastdit", attn_mask=mask), fullgraph=True, dynamic=True,
        backend="aot_eager",
    )  # fmt: skip
    for n, stance in ((7, "default"), (12, "fail_on_recompile"), (33, "fail_on_recompile")):
        q, k, v = (torch.randn(B, n, H, D) for _ in "qkv")
        mask = torch.rand(B, n) < 0.7
        with torch.compiler.set_stance(stance):
            actual = run(q, k, v, mask)
        close.assert_bitwise(actual, dispatch(q, k, v, "fastdit", attn_mask=mask))


# Models as they are -----------------------------------------------------------------------------------------------


def outputs(entry, model, dtype):
    return entry.call(model, entry.given(dtype))


@torch.no_grad()
def test_a_model_as_it_is(calls):
    model = WAN.build()
    before = outputs(WAN, model, torch.float32)
    with no_rounding():
        truth = outputs(WAN, exact(model), torch.float64)
    with attention_backend("fastdit"):
        inside = outputs(WAN, model, torch.float32)
    assert len(calls) == 4
    close.assert_bitwise(outputs(WAN, model, torch.float32), before)  # and out again
    model.set_attention_backend("fastdit")
    close.assert_bitwise(outputs(WAN, model, torch.float32), inside)
    assert len(calls) == 8
    close.assert_close(inside, truth, before)
    model.reset_attention_backend()
    model.set_attention_backend("native")
    close.assert_bitwise(outputs(WAN, model, torch.float32), before)
    assert len(calls) == 8


@each_dtype
@torch.no_grad()
def test_padded_text_before_the_image(dtype, calls):
    """Qwen-Image: the text that counts, a gap, the image. Not a prefix."""
    from diffusers import QwenImageTransformer2DModel

    small = dict(patch_size=2, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=20)
    heads = dict(num_attention_heads=3, attention_head_dim=16, axes_dims_rope=(4, 6, 6))
    model = cast(randomize(QwenImageTransformer2DModel(**small, **heads)), dtype)
    image, text, steps = zoo.randn(2, 24, 16), zoo.randn(2, 7, 20), torch.tensor([0.1, 0.7])
    mask, shapes = torch.arange(7) < torch.tensor([[7], [4]]), [[(1, 4, 6)]] * 2

    def run(model, dtype):
        return model(image.to(dtype), text.to(dtype), mask, steps.to(dtype), shapes, return_dict=False)[0]

    before = run(model, dtype)
    with no_rounding():
        truth = run(exact(model), torch.float64)
    with attention_backend("fastdit"):
        after = run(model, dtype)
    assert [call["kv_len"].tolist() for call in calls] == [[31, 28]] * 2
    close.assert_close(after, truth, before)


# Models that are accelerated --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_choice_after_accelerate(calls, monkeypatch):
    """Another backend is diffusers' own attention inside fastdit's blocks; "fastdit" and a reset take it back."""
    fused, model = [], WAN.build()
    monkeypatch.setattr(ops, "qk_norm_rope", counted(ops.qk_norm_rope, fused))
    report = fastdit.accelerate(model)
    accelerated = outputs(WAN, model, torch.float32)
    assert len(fused) == 4 and not calls  # the processor calls the op itself
    model.set_attention_backend("native")
    native = outputs(WAN, model, torch.float32)
    assert len(fused) == 4 and not torch.equal(native, accelerated)
    fastdit.accelerate(model, ops=set(ops.__all__) - {"attention", "qk_norm_rope"})
    close.assert_bitwise(outputs(WAN, model, torch.float32), native)
    fastdit.accelerate(model)
    for again in (lambda: model.set_attention_backend("fastdit"), model.reset_attention_backend):
        model.set_attention_backend("_native_math")
        again()
        close.assert_bitwise(outputs(WAN, model, torch.float32), accelerated)
    assert not calls and report.replaced
    with attention_backend("_native_math"):  # for models without a choice
        close.assert_bitwise(outputs(WAN, model, torch.float32), accelerated)


@torch.no_grad()
def test_a_choice_before_accelerate():
    """An explicit choice of somebody else's attention stays; "fastdit" is no reason to leave anything."""
    model = WAN.build()
    model.set_attention_backend("native")
    kept = fastdit.accelerate(model)
    assert not any(row.replaced for row in kept.rows if row.layer == "attention (WanAttnProcessor)")
    assert any(row.why == "another attention backend was chosen for it" for row in kept.rows)
    model.set_attention_backend("fastdit")
    assert any(row.replaced for row in fastdit.accelerate(model).rows if row.layer == "attention (WanAttnProcessor)")
    fastdit.restore(model)
    assert model.blocks[0].attn1.processor._attention_backend == "fastdit"


@torch.no_grad()
def test_models_choose_for_themselves():
    """A choice for one model does not touch another, nor a copy."""
    model, other = WAN.build(), WAN.build()
    fastdit.accelerate([model, other])
    accelerated = outputs(WAN, model, torch.float32)
    clone = copy.deepcopy(model)
    model.set_attention_backend("native")
    for untouched in (other, clone):
        close.assert_bitwise(outputs(WAN, untouched, torch.float32), accelerated)
    for owner in (model, other, clone):
        assert len({id(block.attn1.processor) for block in owner.blocks}) == 1
    assert model.blocks[0].attn1.processor._attention_backend == "native"
    late = copy.deepcopy(model)  # a copy of the choice too
    close.assert_bitwise(outputs(WAN, late, torch.float32), outputs(WAN, model, torch.float32))


def test_context_parallelism_is_the_originals():
    model = WAN.build()
    fastdit.accelerate(model)
    processor = model.blocks[0].attn1.processor
    assert processor.replaced
    processor._parallel_config = object()  # as enable_parallelism does
    assert not processor.replaced and processor.original._parallel_config is processor._parallel_config


def test_processors_without_a_choice_have_none():
    """diffusers skips those (DiT's AttnProcessor2_0): they keep fastdit's attention."""
    entry = next(e for e in zoo.models() if str(e) == "DiTTransformer2DModel")
    model = entry.build()
    fastdit.accelerate(model)
    assert not hasattr(model.transformer_blocks[0].attn1.processor, "_attention_backend")
    with torch.no_grad():
        before = outputs(entry, model, torch.float32)
        model.set_attention_backend("native")
        close.assert_bitwise(outputs(entry, model, torch.float32), before)
