"""patch on the CUDA kernels (csrc/cuda/patch.cu): one launch forward for a batch, of a list one for every 16 videos.

(N*K + N*D + D*K) * itemsize bytes, 2*N*D*K FLOPs; no workspace.
"""

from __future__ import annotations

from .._patch_abi import embed_arguments, embed_shape
from .._tensors import contiguous
from ..registry import Impl, register as _register
from ._launch import launch, unfit

VALUES = 4096  # of a token, the most: where they stand inside a patch is a table in shared memory


def patch_embed3d(x, weight, bias, pos, grids):
    y = x.new_empty(embed_shape(x, weight, grids))
    bias = contiguous(bias)
    arguments = embed_arguments(x, weight, bias, pos, y, grids)
    launch("patch_embed3d_forward", "patch_embed3d", x, arguments, (x, weight, bias, pos), (y,))
    return y


def register() -> None:
    _register(Impl("patch_embed3d", "cuda", lambda x, *_: unfit(x), patch_embed3d, None))
