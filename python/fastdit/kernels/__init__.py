"""Triton kernels; the sources stand in the top-level folder `kernels/` and are installed here."""
