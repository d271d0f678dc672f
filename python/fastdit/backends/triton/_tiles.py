"""What every adapter derives from sizes: the power of two that a tile has, and what loads may take for granted."""

from __future__ import annotations


def power(n: int) -> int:
    """The least power of two that holds n."""
    return 1 << max(n - 1, 0).bit_length()


def alignment(itemsize: int, *strides: int) -> int:
    """ALIGN: the elements in 16 bytes where every stride is a multiple of them, else 1."""
    elements, low = 16 // itemsize, 0
    for stride in strides:  # elements is a power of two: the low bits of all of them at once
        low |= stride
    return 1 if low % elements else elements
