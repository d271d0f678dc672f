"""Products of the interpreter in fp32 and TF32, rounded where a GPU rounds."""

import numpy as np


def round_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 to 10 bits of mantissa, ties away from zero, as cvt.rna.tf32 does."""
    bits = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), bits.view(np.float32), x)


def fp32_dot(x: np.ndarray, y: np.ndarray, d: np.ndarray) -> np.ndarray:
    """x @ y + d, rounded once to fp32: the bits of a product are those of its transpose, as with a GPU's FMA chains.

    numpy's fp32 product has another order on every CPU and for every layout; a backward that computes the scores as
    k @ q.T would not meet the rounding that the lse holds. A GPU rounds along K too: that is not shown here.
    """
    return (np.matmul(x.astype(np.float64), y.astype(np.float64)) + d).astype(np.float32)
