"""Products of the interpreter in fp32 and TF32, rounded where a GPU rounds."""

import numpy as np


def round_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 to 10 bits of mantissa, ties away from zero, as cvt.rna.tf32 does."""
    bits = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), bits.view(np.float32), x)


def fp32_dot(x: np.ndarray, y: np.ndarray, d: np.ndarray) -> np.ndarray:
    """A chain of fp32 sums along K, as a GPU's FMAs make it: the bits of x @ y are those of its transpose.

    numpy's fp32 product has another order on every CPU and for every layout; a backward that computes the scores as
    k @ q.T would not meet the forward's rounding, which its lse holds.
    """
    x, y, step = x.astype(np.float64), y.astype(np.float64), 8
    for k in range(0, x.shape[-1], step):
        d = (d + np.matmul(x[..., k : k + step], y[..., k : k + step, :])).astype(np.float32)
    return d
