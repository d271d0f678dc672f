"""The contract (`fastdit.testing.contract`) on every sample of every op: CPU kernels per instruction set, reference."""

import pytest
import torch

from fastdit.backends import registry
from fastdit.testing import contract
from fastdit.testing.workloads import samples

# Compiled and opchecked too: one sample per code path of the host.
HOT = {
    "norm_modulate": ("adaln", "adaln-native", "packed-index"),
    "gate_residual": ("gate",),
    "gate_residual_norm_modulate": ("seam", "indexed"),
    "qk_norm_rope": ("hunyuan", "cogvideox-native", "wan", "ltx2-split", "packed-axes", "tail-D-half"),
    "attention": ("self", "lse", "cross", "kv-len", "frame-causal"),
    "attention_varlen": ("packed", "lse", "cross", "frame-causal", "window"),
    "merge_attention": ("dense",),
    "patch_embed3d": ("image-pos", "fp32-weight", "blocks", "frames-first", "list", "list-pos"),
    "unpatchify3d": ("wan", "hunyuan", "list"),
    "causal_conv3d": ("wan", "wan-ncdhw", "down-space", "ltx2", "cogvideox"),
    "next_cache": ("roll",),
    "norm_silu": ("l2", "group"),
    "activation": ("gelu_tanh", "gated-halves"),
}
HOT_SAMPLES = [s for s in samples() if s.id in HOT.get(s.op, ())]
SAMPLES = [s for s in samples() if "cpu" in registry.implementations(s.op)]
LISTS = [s for s in HOT_SAMPLES if s.id.startswith("list")]  # Python lists: fullgraph, but a graph per pack

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)
each_hot = pytest.mark.parametrize("sample", HOT_SAMPLES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def test_every_hot_sample_exists():
    for op, ids in HOT.items():
        assert set(ids) <= {s.id for s in samples(op)}, op


@each_dtype
@each_sample
def test_forward(sample, dtype, isa):
    contract.forward(sample, dtype, "cpu")


@each_dtype
@each_sample
def test_backward(sample, dtype, isa):
    contract.backward(sample, dtype, "cpu")


@each_backend
@each_sample
def test_gradcheck(sample, backend):
    contract.gradcheck(sample, backend)


@each_hot
def test_opcheck(sample):
    assert contract.opcheck(sample, "cpu") == 2


@each_dtype
@each_sample
def test_fast_path_equals_torch_ops(sample, dtype):
    contract.paths_equal(sample, dtype, "cpu", calls=2)


@each_backend
@each_hot
def test_compile(sample, backend):
    contract.compile_dynamic(sample, backend, **({"lengths": (6,)} if sample in LISTS else {}))


@each_sample
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_threads(sample, dtype):
    contract.threads_equal(sample, dtype, "cpu")
