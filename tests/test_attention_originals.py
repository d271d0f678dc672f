"""The attention reference against SDPA in fp64, diffusers' processors and masks, and NATTEN's window formula."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from fastdit.reference import attention as ref
from fastdit.testing import close

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


def _sdpa(q, k, v, **kwargs):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **kwargs).transpose(1, 2)


def _same(actual, expected):
    """Equal up to the rounding of fp64: both sides are formulas in double."""
    close.assert_close(actual.float(), expected, expected.float())


@pytest.mark.parametrize("heads, dim", [(16, 72), (2, 64), (3, 96), (2, 112), (2, 128)])
def test_sdpa_fp64(heads, dim):
    q, k, v = torch.randn(2, 33, 3, heads, dim, dtype=torch.double).unbind(2)
    _same(ref.attention(q, k, v), _sdpa(q, k, v))
    _same(ref.attention(q, k[:, :7], v[:, :7], scale=0.2), _sdpa(q, k[:, :7], v[:, :7], scale=0.2))
    grouped = k[:, :, : heads // 2 or 1], v[:, :, : heads // 2 or 1]
    if heads % 2 == 0:
        _same(ref.attention(q, *grouped), _sdpa(q, *grouped, enable_gqa=True))


@each_dtype
def test_sdpa_in_its_own_dtype(dtype):
    q, k, v = torch.randn(2, 50, 3, 4, 72).to(dtype).unbind(2)
    truth = _sdpa(q.double(), k.double(), v.double())
    close.assert_close(ref.attention(q, k, v), truth, _sdpa(q, k, v))


def test_lse_is_that_of_the_flash_kernel():
    q, k, v = (torch.randn(1, 40, 2, 16, dtype=torch.double) for _ in range(3))
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, lse = op(*(t.transpose(1, 2) for t in (q, k, v)))
    ours = ref.attention(q, k, v, return_lse=True)
    _same(ours[0], o.transpose(1, 2))
    _same(ours[1], lse.reshape(1, -1, 2).transpose(1, 2) if lse.shape[1] == 40 else lse)


# ---- the models' own modules ------------------------------------------------------------------------------
def _heads(y, heads):
    return y.unflatten(-1, (heads, -1))


def test_dit_attention_module():
    module = Attention(1152, heads=16, dim_head=72, bias=True, processor=AttnProcessor2_0()).double()
    x = torch.randn(2, 20, 1152, dtype=torch.double)
    q, k, v = (_heads(layer(x), 16) for layer in (module.to_q, module.to_k, module.to_v))
    _same(module.to_out[0](ref.attention(q, k, v).flatten(-2)), module(x))


def test_pixart_text_mask_is_kv_len():
    """PixArt adds -10000 to padded text keys (transformer_2d's encoder_attention_mask); kv_len says the same."""
    module = Attention(144, cross_attention_dim=96, heads=2, dim_head=72, processor=AttnProcessor2_0()).double()
    x, text = torch.randn(2, 20, 144, dtype=torch.double), torch.randn(2, 12, 96, dtype=torch.double)
    kv_len = torch.tensor([5, 12], dtype=torch.int32)
    keep = torch.arange(12) < kv_len[:, None]
    bias = (1 - keep.double()).unsqueeze(1) * -10000.0
    q, k, v = _heads(module.to_q(x), 2), _heads(module.to_k(text), 2), _heads(module.to_v(text), 2)
    _same(module.to_out[0](ref.attention(q, k, v, kv_len=kv_len).flatten(-2)), module(x, text, attention_mask=bias))


def test_hunyuan_video_mask_is_kv_len():
    """transformer_hunyuan_video.py: bool [B, 1, 1, N], True up to the valid text tokens behind the latents."""
    q, k, v = torch.randn(2, 30, 3, 2, 64, dtype=torch.double).unbind(2)
    effective = torch.tensor([22, 30])
    mask = (torch.arange(30).expand(2, 30) < effective.unsqueeze(1)).unsqueeze(1).unsqueeze(1)
    _same(ref.attention(q, k, v, kv_len=effective.int()), _sdpa(q, k, v, attn_mask=mask))


def test_skyreels_block_causal_mask_is_frame_tokens():
    """transformer_skyreels_v2.py, num_frame_per_block > 1: a block of frames sees itself and what came before."""
    frames, height, width, per_block = 6, 2, 3, 2
    blocks = torch.arange(frames // per_block).repeat_interleave(per_block)
    mask = (blocks.unsqueeze(0) <= blocks.unsqueeze(1)).view(frames, 1, 1, frames, 1, 1)
    mask = mask.repeat(1, height, width, 1, height, width)
    mask = mask.reshape(frames * height * width, frames * height * width).unsqueeze(0).unsqueeze(0)
    q, k, v = torch.randn(1, frames * height * width, 3, 2, 16, dtype=torch.double).unbind(2)
    frame_tokens = per_block * height * width
    _same(ref.attention(q, k, v, frame_tokens=frame_tokens), _sdpa(q, k, v, attn_mask=mask))
    # with a KV cache the queries are the last block only
    last = slice(-frame_tokens, None)
    _same(ref.attention(q[:, last], k, v, frame_tokens=frame_tokens), _sdpa(q, k, v, attn_mask=mask)[:, last])


def test_wan_image_to_video_cross_attention():
    """Text and CLIP keys are attended apart and summed: two calls, no mask."""
    module = WanAttention(
        dim=256, heads=2, dim_head=128, eps=1e-6, added_kv_proj_dim=256, cross_attention_dim_head=128,
        processor=WanAttnProcessor(),
    ).double()  # fmt: skip
    x, text = torch.randn(1, 10, 256, dtype=torch.double), torch.randn(1, 257 + 512, 256, dtype=torch.double)
    image, prompt = text[:, :257], text[:, 257:]
    q = _heads(module.norm_q(module.to_q(x)), 2)
    k, v = _heads(module.norm_k(module.to_k(prompt)), 2), _heads(module.to_v(prompt), 2)
    k_image, v_image = _heads(module.norm_added_k(module.add_k_proj(image)), 2), _heads(module.add_v_proj(image), 2)
    o = ref.attention(q, k, v).flatten(-2) + ref.attention(q, k_image, v_image).flatten(-2)
    _same(module.to_out[0](o), module(x, text))


def test_packed_is_each_sequence_alone():
    """Wan's native flash_attention(q_lens, k_lens) and HunyuanVideo's varlen backend loop over the samples."""
    lengths_q, lengths_k = (5, 0, 12), (9, 3, 4)
    q, k, v = (torch.randn(n, 2, 16, dtype=torch.double) for n in (17, 16, 16))
    cu_q = torch.tensor([0, *itertools.accumulate(lengths_q)], dtype=torch.int32)
    cu_k = torch.tensor([0, *itertools.accumulate(lengths_k)], dtype=torch.int32)
    bounds = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=12, max_seqlen_k=9)
    alone = [
        _sdpa(q[None, cu_q[i] : cu_q[i + 1]], *(t[None, cu_k[i] : cu_k[i + 1]] for t in (k, v)))[0] for i in range(3)
    ]
    _same(ref.attention_varlen(q, k, v, **bounds), torch.cat(alone))


# ---- NATTEN -----------------------------------------------------------------------------------------------
def _natten_start(i: int, n: int, w: int, s: int) -> int:
    return min(max(i // s * s + s // 2 - w // 2, 0), n - w)


@pytest.mark.parametrize(
    "grid, window, stride",
    [
        ((3, 5, 7), (2, 3, 3), (1, 1, 1)),
        ((4, 6, 6), (3, 4, 5), (2, 2, 4)),
        ((1, 8, 8), (1, 4, 4), (1, 4, 4)),
        ((2, 3, 9), (2, 3, 4), (1, 3, 2)),
        ((5, 1, 6), (5, 1, 6), (1, 1, 1)),
    ],
)
def test_natten_window_by_brute_force(grid, window, stride):
    """arXiv 2504.16922: exactly t*h*w neighbours for every query, shifted inside at the borders."""
    tokens = list(itertools.product(*map(range, grid)))
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for a, query in enumerate(tokens):
        start = [_natten_start(*axis) for axis in zip(query, grid, window, stride, strict=True)]
        for b, key in enumerate(tokens):
            mask[a, b] = all(s <= j < s + w for s, j, w in zip(start, key, window, strict=True))
    volume = window[0] * window[1] * window[2]
    assert (mask.sum(1) == volume).all()
    n = len(tokens)
    q, k, v = torch.randn(n, 3, 2, 8, dtype=torch.double).unbind(1)
    packed = dict(cu_seqlens_q=torch.tensor([0, n], dtype=torch.int32), max_seqlen_q=n)
    grids = torch.tensor([grid], dtype=torch.int32)
    o = ref.attention_varlen(q, k, v, **packed, window=window, window_stride=stride, grids=grids)
    _same(o, _sdpa(q[None], k[None], v[None], attn_mask=mask)[0])


def test_merge_is_softmax_over_the_union():
    q, k, v = torch.randn(2, 9, 3, 2, 8, dtype=torch.double).unbind(2)
    parts = [ref.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 4), (4, 9))]
    o, lse = ref.merge_attention(*parts[0], *parts[1])
    _same(o, _sdpa(q, k, v))
    _same(lse, ref.attention(q, k, v, return_lse=True)[1])
