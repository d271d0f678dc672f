"""Every op's samples on the Triton kernels: in the interpreter on CPU tensors, or on the GPU where there is one."""

import pytest
import torch
from test_contract import HOT_SAMPLES, LISTS

from fastdit.backends import registry
from fastdit.testing import contract
from fastdit.testing.workloads import samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# what `supports` refuses: tests/test_conv_triton.py holds it to the reason
REFUSED = ("causal_conv3d-winograd-odd", "causal_conv3d-winograd2d-odd")
SAMPLES = [s for s in samples() if "triton" in registry.implementations(s.op) and str(s) not in REFUSED]
HOT = [s for s in HOT_SAMPLES if s in SAMPLES]
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []


def _full(sample):
    return () if sample in HOT else pytest.mark.full


# fp16 is bf16's code but for the format of loads and stores; torch.ops and the fast path part in the host
EACH = [
    pytest.param(s, dtype, id=f"{s}-{dtype}", marks=_full(s) if dtype == torch.float16 else ())
    for s in SAMPLES for dtype in contract.DTYPES
]  # fmt: skip
ROUTED = [pytest.param(s, id=str(s), marks=_full(s)) for s in SAMPLES]
# torch's own checks take seconds and read schemas and layouts; these differ from a row beside them in numbers, masks or
# options alone, and the CPU's kernels have all of them checked
ALIKE = {
    "norm_modulate": ("adaln-native",),
    "qk_norm_rope": ("hunyuan", "cogvideox-native", "ltx2-split"),
    "attention": ("self", "frame-causal"),
    "attention_varlen": ("packed", "frame-causal"),
    "patch_embed3d": ("blocks", "frames-first", "list"),
    "unpatchify3d": ("hunyuan",),
    "causal_conv3d": ("down-space", "ltx2", "cogvideox"),
}
CHECKED = [pytest.param(s, id=str(s), marks=pytest.mark.full if s.id in ALIKE.get(s.op, ()) else ()) for s in HOT]


@pytest.mark.parametrize("sample, dtype", EACH)
def test_forward(sample, dtype):
    contract.forward(sample, dtype, "triton", DEVICE)


@pytest.mark.parametrize("sample, dtype", [row for row in EACH if not row.values[0].moves])
def test_backward(sample, dtype):
    contract.backward(sample, dtype, "triton", DEVICE)


@pytest.mark.parametrize("sample", CHECKED)
def test_opcheck(sample):
    assert contract.opcheck(sample, "triton", DEVICE) == 2


@pytest.mark.parametrize("sample", ROUTED)
def test_fast_path_equals_torch_ops(sample):
    contract.paths_equal(sample, torch.bfloat16, "triton", DEVICE, calls=4 if DEVICE == "cuda" else 1)


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_compile(sample):
    """A static graph, a dynamic one, and that one again."""
    lengths = (6,) if sample in LISTS else (2, 3, 4) if sample.op == "causal_conv3d" else (6, 8, 12)
    contract.compile_dynamic(sample, "triton", lengths, DEVICE)
