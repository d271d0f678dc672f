"""The rotary reference against the modules of diffusers themselves: real processors, real head sizes, few tokens.

Queries and keys are taken from inside each processor, just before its attention. Where the original rounds at the same
places as a precision law, equality is bitwise in every dtype; where it rounds elsewhere (nn.RMSNorm rounds once, its
rotation again), each of its two steps is still met bitwise, and both fused laws stay as close to the fp64 truth.
"""

import copy

import pytest
import torch
from diffusers.models import attention_processor, embeddings
from diffusers.models.transformers import (
    transformer_cosmos,
    transformer_hunyuan_video,
    transformer_kandinsky6,
    transformer_ltx,
    transformer_ltx2,
    transformer_minimax_h3,
    transformer_mochi,
    transformer_qwenimage,
    transformer_wan,
)

from fastdit.reference import rotary
from fastdit.testing import close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)
GRID = (2, 3, 5)
TOKENS = 30


class Captured(Exception):
    pass


class Given(torch.nn.Module):
    """Stands in for a projection: the query or key itself."""

    def __init__(self, t):
        super().__init__()
        self.t = t

    def forward(self, _):
        return self.t.flatten(2)


@pytest.fixture
def run(monkeypatch):
    """run(attn, q, k, *args, **kwargs): what the processor makes of q and k, (B, N, H, D) before its attention."""

    def capture(q, k, *args, **kwargs):
        raise Captured(q, k)

    for module in (transformer_hunyuan_video, transformer_ltx, transformer_ltx2, transformer_wan, transformer_cosmos):
        monkeypatch.setattr(module, "dispatch_attention_fn", capture)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", capture)

    def call(attn, q, k, *args, **kwargs):
        attn = copy.deepcopy(attn)
        attn.to_q, attn.to_k = Given(q), Given(k)
        with pytest.raises(Captured) as caught:
            attn(*args, **kwargs)
        out = caught.value.args
        heads_first = out[0].shape[1] == q.shape[2] and q.shape[1] != q.shape[2]
        return tuple(t.transpose(1, 2) for t in out) if heads_first else out

    return call


def randomised(module, dtype=torch.float32):
    """Norm parameters away from 1 and 0, so that one which is dropped or misplaced shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "norm" in name:
                p.copy_(torch.randn_like(p) * 0.3 + (0.0 if name.endswith("bias") else 1.0))
    return module.to(dtype).eval().requires_grad_(False)


def affine(attn):
    bias = [getattr(n, "bias", None) for n in (attn.norm_q, attn.norm_k)]
    return {"q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight, "q_bias": bias[0], "k_bias": bias[1]}


def qk(dtype, heads, dim, tokens=TOKENS):
    torch.manual_seed(1)
    return tuple((torch.randn(2, tokens, heads, dim) * 1.7 + 0.2).to(dtype) for _ in "qk")


def wide(tensors):
    return tuple(t.double() for t in tensors)


def equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b), f"max difference {(a.double() - b.double()).abs().max():.3g}"


def as_close(ours, theirs, truth):
    """No further from the fp64 truth than the original is, in the sense of testing/close.py."""
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        close.assert_close(a, t, b)


def doubled(grid, axes_dim, theta=10000.0):
    """Compact tables and the (N, D) form of diffusers, every value twice."""
    cos, sin = rotary.rope_table(grid, axes_dim, theta=theta)
    return (cos, sin), (cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1))


# ---- the rotation alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "native"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unbind", [-1, -2], ids=["interleaved", "half"])
def test_apply_rotary_emb(dtype, unbind, precision):
    q = torch.randn(2, TOKENS, 24, 128).to(dtype)
    k = torch.randn(2, TOKENS, 8, 128).to(dtype)
    (cos, sin), full = doubled(GRID, (16, 56, 56), 256.0)
    if unbind == -2:
        full = tuple(torch.cat([t, t], dim=-1) for t in (cos, sin))
    theirs = [embeddings.apply_rotary_emb(t, full, use_real_unbind_dim=unbind, sequence_dim=1) for t in (q, k)]
    layout = "interleaved" if unbind == -1 else "half"
    equal(rotary.qk_norm_rope(q, k, cos=cos, sin=sin, layout=layout, precision=precision), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_complex_form(dtype):
    q, k = (torch.randn(2, TOKENS, 24, 128) for _ in "qk")
    cos, sin = rotary.rope_table(GRID, (16, 56, 56))
    cis = torch.complex(cos, sin)
    ours = rotary.qk_norm_rope(q.to(dtype), k.to(dtype), cos=cos, sin=sin)
    theirs = [transformer_qwenimage.apply_rotary_emb_qwen(t.to(dtype), cis, use_real=False) for t in (q, k)]
    truth = rotary.qk_norm_rope(q.to(dtype).double(), k.to(dtype).double(), cos=cos, sin=sin)
    as_close(ours, theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kandinsky6_matrices(dtype):
    q, k = (torch.randn(2, TOKENS, 32, 128).to(dtype) for _ in "qk")
    cos, sin = rotary.rope_table(GRID, (32, 48, 48))
    matrices = torch.stack([cos, -sin, sin, cos], dim=-1).view(TOKENS, 1, 64, 2, 2)
    theirs = [transformer_kandinsky6.apply_rotary(t, matrices) for t in (q, k)]
    equal(rotary.qk_norm_rope(q, k, cos=cos, sin=sin), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minimax_h3_partial_in_activation_dtype(dtype):
    q, k = torch.randn(1, TOKENS, 56, 128).to(dtype), torch.randn(1, TOKENS, 8, 128).to(dtype)
    positions = torch.cartesian_prod(*(torch.arange(n) for n in GRID))
    full = transformer_minimax_h3.MiniMaxH3RotaryPosEmbed(rope_freq_dim=16)(positions)  # (N, 96), half twice
    theirs = [transformer_minimax_h3._apply_rotary_emb(t, *full) for t in (q, k)]
    cos, sin = (t[:, :48].to(dtype) for t in full)
    equal(rotary.qk_norm_rope(q, k, cos=cos, sin=sin, layout="half", precision="native"), theirs)


@pytest.mark.parametrize("precision", ["fp32", "native"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_allegro(dtype, precision):
    q, k = (torch.randn(2, TOKENS, 24, 96).to(dtype) for _ in "qk")
    T, H, W = GRID
    *freqs, grid_t, grid_h, grid_w = embeddings.get_3d_rotary_pos_embed_allegro(
        96, ((0, 0), (H, W)), (H, W), T, interpolation_scale=(2.0, 2.0, 2.0)
    )
    positions = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long()).transpose(0, 1).reshape(3, 1, -1)
    theirs = [embeddings.apply_rotary_emb_allegro(t.transpose(1, 2), freqs, positions).transpose(1, 2) for t in (q, k)]
    axes = [table[:, :16] for pair in freqs for table in pair]  # each axis table holds its 16 values twice
    options = {"layout": "axis_half", "precision": precision}
    equal(rotary.qk_norm_rope(q, k, axes=axes, grids=torch.tensor([GRID]), **options), theirs)
    cos, sin = rotary.axis_rows(axes, torch.tensor([GRID]), TOKENS, packed=False)
    equal(rotary.qk_norm_rope(q, k, cos=cos, sin=sin, **options), theirs)


# ---- whole processors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_wan_all_heads_rms(run, dtype):
    processor = transformer_wan.WanAttnProcessor()
    attn = transformer_wan.WanAttention(dim=16, heads=12, dim_head=128, eps=1e-6, processor=processor)
    attn = randomised(attn, dtype)
    q, k = qk(dtype, 12, 128)
    latent = torch.empty(1, 16, GRID[0], GRID[1] * 2, GRID[2] * 2)
    full = transformer_wan.WanRotaryPosEmbed(128, (1, 2, 2), 1024)(latent)  # (1, N, 1, 128)
    x = torch.zeros(2, TOKENS, 16, dtype=dtype)
    theirs = run(attn, q, k, x, rotary_emb=full)
    truth = run(attn.double(), *wide((q, k)), x.double(), rotary_emb=wide(full))

    norm = {**affine(attn.to(dtype)), "norm": "rms", "scope": "hidden"}
    rope = {"cos": full[0][..., 0::2], "sin": full[1][..., 1::2]}  # last stride 2
    normed = rotary.qk_norm_rope(q, k, **norm)
    equal(normed, [n(t.flatten(2)).view_as(t) for n, t in ((attn.norm_q, q), (attn.norm_k, k))])
    equal(rotary.qk_norm_rope(*normed, **rope), theirs)
    for precision in ("fp32", "native"):
        as_close(rotary.qk_norm_rope(q, k, **norm, **rope, precision=precision), theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hunyuan_video_single_stream(run, dtype):
    attn = randomised(
        attention_processor.Attention(
            query_dim=16,
            heads=24,
            dim_head=128,
            qk_norm="rms_norm",
            eps=1e-6,
            bias=True,
            processor=transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0(),
            pre_only=True,
        ),
        dtype,
    )
    text = 7
    q, k = qk(dtype, 24, 128, TOKENS + text)
    (cos, sin), full = doubled(GRID, (16, 56, 56), 256.0)
    x, y = torch.zeros(2, TOKENS, 16, dtype=dtype), torch.zeros(2, text, 16, dtype=dtype)
    theirs = run(attn, q, k, x, encoder_hidden_states=y, image_rotary_emb=full)
    truth = run(attn.double(), *wide((q, k)), x.double(), encoder_hidden_states=y.double(), image_rotary_emb=full)
    options = {**affine(attn.to(dtype)), "norm": "rms", "cos": cos, "sin": sin, "rope_len": TOKENS}
    equal(rotary.qk_norm_rope(q, k, **options, precision="native"), theirs)
    as_close(rotary.qk_norm_rope(q, k, **options), theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cogvideox_layer_norm_and_video_slice(run, dtype):
    attn = randomised(
        attention_processor.Attention(
            query_dim=16,
            heads=48,
            dim_head=64,
            qk_norm="layer_norm",
            eps=1e-6,
            bias=True,
            processor=attention_processor.CogVideoXAttnProcessor2_0(),
        ),
        dtype,
    )
    text = 11
    q, k = qk(dtype, 48, 64, TOKENS + text)
    (cos, sin), full = doubled(GRID, (16, 24, 24))
    x, y = torch.zeros(2, TOKENS, 16, dtype=dtype), torch.zeros(2, text, 16, dtype=dtype)
    theirs = run(attn, q, k, x, encoder_hidden_states=y, image_rotary_emb=full)
    truth = run(attn.double(), *wide((q, k)), x.double(), encoder_hidden_states=y.double(), image_rotary_emb=full)
    options = {**affine(attn.to(dtype)), "norm": "layer", "cos": cos, "sin": sin, "rope_start": text}
    equal(rotary.qk_norm_rope(q, k, **options, precision="native"), theirs)
    as_close(rotary.qk_norm_rope(q, k, **options), theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cosmos_half(run, dtype):
    attn = randomised(
        attention_processor.Attention(
            query_dim=16,
            heads=16,
            dim_head=128,
            qk_norm="rms_norm",
            elementwise_affine=True,
            processor=transformer_cosmos.CosmosAttnProcessor2_0(),
        ),
        dtype,
    )
    q, k = qk(dtype, 16, 128)
    latent = torch.empty(1, 16, GRID[0], GRID[1] * 2, GRID[2] * 2)
    full = transformer_cosmos.CosmosRotaryPosEmbed(128)(latent, fps=24)
    theirs = run(attn, q, k, torch.zeros(2, TOKENS, 16, dtype=dtype), image_rotary_emb=full)
    cos, sin = (t[:, :64] for t in full)
    options = {**affine(attn), "norm": "rms", "eps": 1e-5, "cos": cos, "sin": sin, "layout": "half"}
    equal(rotary.qk_norm_rope(q, k, **options, precision="native"), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ltx_tables_over_all_channels(run, dtype):
    H, D = 32, 64
    attn = randomised(transformer_ltx.LTXAttention(query_dim=16, heads=H, kv_heads=H, dim_head=D), dtype)
    q, k = qk(dtype, H, D)
    x = torch.zeros(2, TOKENS, 16, dtype=dtype)
    full = transformer_ltx.LTXVideoRotaryPosEmbed(dim=H * D)(x, *GRID, rope_interpolation_scale=(0.32, 32, 32))
    theirs = run(attn, q, k, x, image_rotary_emb=full)
    truth = run(attn.double(), *wide((q, k)), x.double(), image_rotary_emb=full)

    norm = {**affine(attn.to(dtype)), "norm": "rms", "scope": "hidden", "eps": 1e-5}
    cos, sin = (t[..., 0::2].unflatten(-1, (H, D // 2)) for t in full)  # each head has frequencies of its own
    normed = rotary.qk_norm_rope(q, k, **norm)
    equal(normed, [n(t.flatten(2)).view_as(t) for n, t in ((attn.norm_q, q), (attn.norm_k, k))])
    equal(rotary.qk_norm_rope(*normed, cos=cos, sin=sin), theirs)
    as_close(rotary.qk_norm_rope(q, k, **norm, cos=cos, sin=sin), theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope_type", ["interleaved", "split"])
def test_ltx2_cross_modal(run, dtype, rope_type):
    H, D = 32, 64
    attn = randomised(
        transformer_ltx2.LTX2Attention(query_dim=16, heads=H, kv_heads=H, dim_head=D, rope_type=rope_type), dtype
    )
    q, k = qk(dtype, H, D)[0], qk(dtype, H, D, tokens=13)[1]  # video queries, audio keys, tables of their own
    full = []
    for modality, length in (("video", TOKENS), ("audio", 13)):
        embed = transformer_ltx2.LTX2AudioVideoRotaryPosEmbed(
            dim=H * D, modality=modality, rope_type=rope_type, num_attention_heads=H, double_precision=True
        )
        full.append(embed(torch.rand(2, 1, length) * 9))
    x, y = torch.zeros(2, TOKENS, 16, dtype=dtype), torch.zeros(2, 13, 16, dtype=dtype)
    tables = {"query_rotary_emb": full[0], "key_rotary_emb": full[1]}
    theirs = run(attn, q, k, x, encoder_hidden_states=y, **tables)
    truth = run(attn.double(), *wide((q, k)), x.double(), encoder_hidden_states=y.double(), **tables)

    if rope_type == "split":  # (B, H, N, D/2)
        cos, sin, k_cos, k_sin = (t.transpose(1, 2) for pair in full for t in pair)
    else:  # (B, N, C)
        cos, sin, k_cos, k_sin = (t[..., 0::2].unflatten(-1, (H, D // 2)) for pair in full for t in pair)
    rope = {"cos": cos, "sin": sin, "k_cos": k_cos, "k_sin": k_sin}
    rope["layout"] = "half" if rope_type == "split" else "interleaved"
    norm = {**affine(attn.to(dtype)), "norm": "rms", "scope": "hidden"}
    normed = rotary.qk_norm_rope(q, k, **norm)
    equal(normed, [n(t.flatten(2)).view_as(t) for n, t in ((attn.norm_q, q), (attn.norm_k, k))])
    if rope_type == "interleaved":
        equal(rotary.qk_norm_rope(*normed, **rope), theirs)
    as_close(rotary.qk_norm_rope(q, k, **norm, **rope), theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mochi_tables_per_head(run, dtype):
    H, D, text = 24, 128, 9
    attn = attention_processor.MochiAttention(
        query_dim=16,
        added_kv_proj_dim=16,
        heads=H,
        dim_head=D,
        processor=attention_processor.MochiAttnProcessor2_0(),
    )
    attn = randomised(attn, dtype)
    q, k = qk(dtype, H, D)
    torch.manual_seed(2)
    cos, sin = transformer_mochi.MochiRoPE()(torch.randn(3, H, D // 2), *GRID, dtype=torch.float32)  # (N, H, D/2)
    x, y = torch.zeros(2, TOKENS, 16, dtype=dtype), torch.zeros(2, text, 16, dtype=dtype)
    mask = torch.ones(2, text, dtype=torch.bool)
    theirs = [
        t[:, :TOKENS]
        for t in run(attn, q[:1], k[:1], x[:1], y[:1], attention_mask=mask[:1], image_rotary_emb=(cos, sin))
    ]

    norm = {**affine(attn), "norm": "rms", "eps": 1e-5}
    normed = rotary.qk_norm_rope(q[:1], k[:1], **norm)  # MochiRMSNorm rounds once, after its weight
    equal(normed, [n(t) for n, t in ((attn.norm_q, q[:1]), (attn.norm_k, k[:1]))])
    equal(rotary.qk_norm_rope(*normed, cos=cos, sin=sin), theirs)
    double = {name: None if t is None else t.double() for name, t in affine(attn).items()}
    truth = rotary.qk_norm_rope(*wide((q[:1], k[:1])), **{**norm, **double}, cos=cos, sin=sin)
    as_close(rotary.qk_norm_rope(q[:1], k[:1], **norm, cos=cos, sin=sin), theirs, truth)


# ---- tables ----------------------------------------------------------------------------------------------------


def test_table_wan_bitwise():
    embed = transformer_wan.WanRotaryPosEmbed(128, (1, 2, 2), 1024)
    theirs = embed(torch.empty(1, 16, 21, 24, 40))
    (cos, sin), full = doubled((21, 12, 20), (44, 42, 42))
    assert cos.shape == sin.shape == (21 * 12 * 20, 64) and cos.dtype == sin.dtype == torch.float32
    equal(full, [t.view(-1, 128) for t in theirs])


@pytest.mark.parametrize("model", ["hunyuan_video", "cogvideox"])
def test_table_fp32_originals(model):
    """These compute their angles in fp32: equal up to the rounding of an angle of their size."""
    grid = (13, 30, 45)
    if model == "hunyuan_video":
        axes_dim, theta = (16, 56, 56), 256.0
        embed = transformer_hunyuan_video.HunyuanVideoRotaryPosEmbed(2, 1, axes_dim, theta)
        theirs = embed(torch.empty(1, 16, grid[0], grid[1] * 2, grid[2] * 2))
    else:
        axes_dim, theta = (16, 24, 24), 10000.0
        crops = ((0, 0), (grid[1], grid[2]))
        theirs = embeddings.get_3d_rotary_pos_embed(64, crops, (grid[1], grid[2]), grid[0])
    _, ours = doubled(grid, axes_dim, theta)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=4 * max(grid) * torch.finfo(torch.float32).eps)


def test_table_of_a_packed_list():
    grids = [(2, 3, 4), (1, 5, 2), (0, 3, 3)]
    packed = rotary.rope_table(grids, (16, 56, 56), theta=256.0)
    parts = [rotary.rope_table(g, (16, 56, 56), theta=256.0) for g in grids]
    equal(packed, [torch.cat(t) for t in zip(*parts, strict=True)])
    assert rotary.rope_table([], (16, 56, 56))[0].shape == (0, 64)


def test_axis_tables_are_the_dense_table():
    grids = [(2, 3, 4), (1, 5, 2)]
    axes_dim = (44, 42, 42)
    axes = [t for size, dim in zip((6, 6, 6), axes_dim, strict=True) for t in rotary.rope_table((size,), (dim,))]
    dense = rotary.rope_table(grids, axes_dim)
    rows = rotary.axis_rows(axes, torch.tensor(grids, dtype=torch.int32), 34, packed=True)
    equal([t.squeeze(1) for t in rows], dense)
