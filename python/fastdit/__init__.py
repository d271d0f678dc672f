"""Compiled kernels that make Diffusion Transformers and causal video VAEs fast, as PyTorch ops."""

__version__ = "0.1.0"
