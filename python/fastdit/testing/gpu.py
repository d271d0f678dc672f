"""The GPU suite: the models' full sizes, and the peers that only a GPU has.

`rows` are in the order of what matters most, for a run that has a time limit. A row too large for an fp64 reference is
judged on the row of the CPU suite that has its head dim and channels.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .workloads import Maker, Workload, activation, attention, conv, modulation, patch, rotary

BF16 = (torch.bfloat16,)
_WAN, _WAN14, _HUNYUAN = 32760, 75600, 118800  # tokens: 480p of 81 frames, 720p of 81, 720p of 129
_SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Peers = dict[str, Callable[..., Any]]


class OnDevice(Maker):
    """Inputs drawn where they are used: a full-size tensor by way of the CPU takes longer than its benchmark."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__(dtype, device)
        self._there = torch.Generator(device).manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        drawn = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(shape, generator=self._there, dtype=drawn, device=self.device).to(dtype)


def rows(op: str | None = None) -> list[Workload]:
    found = [*_dense(), *_masked(), *_memory_bound(), *_conv(), *_patch()]
    return [w for w in found if op is None or w.op == op]


# ---- attention ----------------------------------------------------------------------------------------------
def _dense() -> list[Workload]:
    small = attention.BENCH[-4]  # D = 128
    sizes = (
        ("Wan2.1-1.3B-480p", 1, _WAN, 12, 128), ("DiT-XL/2-512", 2, 1024, 16, 72), ("DiT-XL/2-256", 8, 256, 16, 72),
        ("SD3.5-L-1024", 1, 4429, 38, 64), ("Wan2.1-14B-720p/4", 1, _WAN14, 10, 128),
    )  # fmt: skip
    found = []
    for size in sizes:
        row = attention._dense_row(*size)
        judged = small if size[2] > 8192 else None
        found.append(replace(row, peers={**(row.peers or {}), **attention_peers()}, dtypes=BF16, judged=judged))
    cross = attention._cross_row("Wan2.1-1.3B-text", _WAN, 512, 12, 12, 128)
    return [*found, replace(cross, peers={**(cross.peers or {}), **attention_peers()}, dtypes=BF16)]


def _masked() -> list[Workload]:
    by_model = {w.model: w for w in attention.BENCH}
    ragged = by_model["DiT-XL/2-ragged"]
    ragged = replace(ragged, peers={**(ragged.peers or {}), **varlen_peers()}, dtypes=BF16)
    frames = attention._frame_causal(frames=21, tokens=1560, H=12)
    window = attention._windowed("window-stride-1", (30, 48, 80), (18, 24, 24), (1, 1, 1), 24, 128)
    tiles = attention._windowed("HunyuanVideo-tiles", (30, 48, 80), (18, 24, 24), (16, 8, 8), 24, 128)
    # A mask of all pairs does not fit at these sizes: FlexAttention builds its own, SDPA does all pairs instead.
    large: tuple[tuple[Workload, str, Peers], ...] = (
        (frames, "Wan2.1-480p-frame-causal", {"flex": _Flex(_frames), "sdpa_all_pairs": _all_pairs}),
        (window, "window-stride-1", {"sdpa_all_pairs": _all_pairs}),
        (tiles, "HunyuanVideo-tiles/20", {"sdpa_all_pairs": _all_pairs}),
    )
    return [ragged, *(replace(w, peers=peers, dtypes=BF16, judged=by_model[small]) for w, small, peers in large)]


def _heads_first(*tensors):
    return tuple((t[None] if t.dim() == 3 else t).transpose(1, 2) for t in tensors)


def _sdpa(backend: SDPBackend) -> Callable:
    def peer(q, k, v):
        grouped = q.shape[2] != k.shape[2]
        q, k, v = _heads_first(q, k, v)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)

    return peer


def _all_pairs(q, k, v, **_):
    return F.scaled_dot_product_attention(*_heads_first(q, k, v)).transpose(1, 2)


def attention_peers() -> Peers:
    peers: Peers = {name: _sdpa(backend) for name, backend in _SDPA.items()}
    for name, module in _flash_modules().items():
        peers[name] = lambda q, k, v, call=module.flash_attn_func: _first(call(q, k, v))
    return peers


def varlen_peers() -> Peers:
    peers: Peers = {}
    torch_varlen = _module("torch.nn.attention.varlen")
    if torch_varlen is not None:

        def varlen(q, k, v, *, cu_seqlens_q, max_seqlen_q):
            bounds = (cu_seqlens_q, cu_seqlens_q, max_seqlen_q, max_seqlen_q)
            return torch_varlen.varlen_attn(q, k, v, *bounds)

        peers["torch_varlen"] = varlen
    for name, module in _flash_modules().items():

        def flash(q, k, v, *, cu_seqlens_q, max_seqlen_q, call=module.flash_attn_varlen_func):
            return _first(call(q, k, v, cu_seqlens_q, cu_seqlens_q, max_seqlen_q, max_seqlen_q))

        peers[name] = flash
    return peers


def _flash_modules() -> dict[str, Any]:
    names = {"fa2": ("flash_attn",), "fa3": ("flash_attn_interface", "fa3_fwd_interface", "fa3_fwd")}
    found = {name: next(filter(None, map(_module, modules)), None) for name, modules in names.items()}
    return {name: m for name, m in found.items() if m is not None and hasattr(m, "flash_attn_varlen_func")}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:  # absent, or built for another torch
        return None


# Module -> the distribution that brings it.
PEERS = {
    "liger_kernel": "liger-kernel", "quack": "quack-kernels", "fa3_fwd_interface": "fa3-fwd",
    "flash_attn": "flash-attn", "flash_attn.cute": "flash-attn-4", "diffusers": "diffusers",
    "transformers": "transformers",
}  # fmt: skip


def present() -> dict[str, str]:
    """Version of each library that is measured beside fastdit; absent, or why it does not load."""
    found = {}
    for module, distribution in PEERS.items():
        try:
            importlib.import_module(module)
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = "present, of unknown version"
        except ModuleNotFoundError as error:
            absent = error.name is not None and module.startswith(error.name)
            found[distribution] = "absent" if absent else f"does not load: {error}"
        except Exception as error:  # built for another torch, or without its libraries
            found[distribution] = f"does not load: {error}"
    return found


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _frames(frame_tokens):
    return lambda b, h, i, j: j // frame_tokens <= i // frame_tokens


class _Flex:
    """FlexAttention with a rule instead of a mask of all pairs; its blocks are made once, outside the clock."""

    def __init__(self, rule: Callable) -> None:
        self._rule = rule
        self._made: tuple[Callable, Any] | None = None

    def __call__(self, q, k, v, **masks):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if self._made is None:
            device = q.device.type
            block = create_block_mask(self._rule(**masks), None, None, q.shape[1], k.shape[1], device=device)
            self._made = torch.compile(flex_attention, dynamic=False), block
        call, block = self._made
        return call(*_heads_first(q, k, v), block_mask=block).transpose(1, 2)


# ---- rows of one pass over memory ---------------------------------------------------------------------------
def _memory_bound() -> list[Workload]:
    sizes = (("Wan2.1-1.3B-480p", 1, _WAN, 1536), ("HunyuanVideo-720p", 1, _HUNYUAN, 3072),
             ("Wan2.1-14B-720p", 1, _WAN14, 5120), ("DiT-XL/2-256", 8, 256, 1152),
             ("DiT-XL/2-512", 2, 1024, 1152))  # fmt: skip
    found = []
    for size in sizes:
        norm = modulation._workload("norm_modulate", modulation._bench_norm, modulation._eager_norm, (2, 3), size)
        seam = modulation._workload(
            "gate_residual_norm_modulate", modulation._bench_seam, modulation._eager_seam, (4, 6), size
        )
        found += [replace(norm, peers={**(norm.peers or {}), **norm_peers()}, dtypes=BF16), replace(seam, dtypes=BF16)]
    rope = (
        rotary._workload("Wan2.1-1.3B-480p", 1, _WAN, 12, 128, norm="rms", scope="hidden"),
        rotary._workload("Wan2.1-14B-720p", 1, _WAN14, 40, 128, norm="rms", scope="hidden"),
        rotary._workload("HunyuanVideo-720p", 1, _HUNYUAN + 256, 24, 128, text=256, fused=True, norm="rms",
                         rope_len=_HUNYUAN),
        rotary._workload("Cosmos2-14B", 1, 56320, 40, 128, norm="rms", layout="half"),
    )  # fmt: skip
    mlp = (
        activation._workload("Wan2.1-1.3B-480p", (1, _WAN), 8960),
        activation._workload("Flux2-1024", (1, 4608), 18432, "silu", gated=True),
    )
    gated = replace(mlp[1], peers={**(mlp[1].peers or {}), **gated_peers()})
    return [*found, *(replace(w, dtypes=BF16) for w in (*rope, mlp[0], gated))]


def norm_peers() -> Peers:
    liger = _module("liger_kernel.ops.layer_norm")
    if liger is None:
        return {}

    def peer(x, *, shift, scale):
        one, zero = torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])
        return liger.LigerLayerNormFunction.apply(x, one, zero, 1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    return {"liger": peer}


def gated_peers() -> Peers:
    liger = _module("liger_kernel.ops.swiglu")
    return {} if liger is None else {"liger": lambda x, act, *, up: liger.LigerSiLUMulFunction.apply(x, up)}


# ---- convolution and patches --------------------------------------------------------------------------------
def _conv() -> list[Workload]:
    found = []
    by_model = {w.model: w for w in conv.BENCH if w.op == "causal_conv3d"}
    sizes = (
        ("C96-480p", 96, 4, 2, 480, 832, "C96/128"), ("C192-240p", 192, 4, 2, 240, 416, "C192/64"),
        ("C384-120p", 384, 2, 2, 120, 208, "C384x2/32"), ("C384-60p-first", 384, 1, 0, 60, 104, "C384-first/16"),
    )  # fmt: skip
    for name, C, T, cache, H, W, small in sizes:
        row = conv._workload(f"Wan2.1-{name}", C, T, cache, H, W)
        peers = {**(row.peers or {}), **conv_peers()}
        found.append(replace(row, peers=peers, dtypes=BF16, judged=by_model[f"Wan2.1-{small}"]))
    norm = conv._norm_workload("Wan2.1-C96-480p", "channel_l2", 96, 4, 480, 832, last=True)
    return [*found, replace(norm, dtypes=BF16)]


def conv_peers() -> Peers:
    """The convolution alone, on an input that stands padded: what no chain of kernels can beat by much."""
    layouts = {"cudnn_ncdhw": torch.contiguous_format, "cudnn_ndhwc": torch.channels_last_3d}
    return {name: _ConvAlone(layout) for name, layout in layouts.items()}


class _ConvAlone:
    def __init__(self, layout: torch.memory_format) -> None:
        self._layout = layout
        self._made: tuple[Tensor, Tensor] | None = None
        self._of = 0

    def __call__(self, x, weight, *, bias, cache=None, **_):
        if self._of != x.data_ptr():
            with torch.no_grad():
                missing = 2 - (0 if cache is None else cache.shape[2])
                h = x if cache is None else torch.cat([cache, x], 2)
                padded = F.pad(h, (1, 1, 1, 1, missing, 0)).contiguous(memory_format=self._layout)
                self._made = padded, weight.contiguous(memory_format=self._layout)
            self._of = x.data_ptr()
        assert self._made is not None
        return F.conv3d(*self._made, bias)


def _patch() -> list[Workload]:
    found = (
        patch._bench_embed("Wan2.1-1.3B-480p", 1, 16, (21, 30, 52), 1536),
        patch._bench_embed("Wan2.1-14B-720p", 1, 16, (21, 45, 80), 5120),
        patch._bench_embed("HunyuanVideo-720p", 1, 16, (33, 45, 80), 3072),
        patch._bench_unpatchify("Wan2.1-14B-720p", 1, 16, (21, 45, 80), "thwc"),
    )
    return [replace(w, dtypes=BF16) for w in found]
