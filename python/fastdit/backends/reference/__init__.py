"""The reference formulas as a backend: plain PyTorch, runs on every device, gradients by autograd."""

import importlib

FAMILIES = ("modulation", "rotary", "attention", "patch", "conv", "activation", "adaln")


def register_all() -> None:
    for family in FAMILIES:
        importlib.import_module(f"{__name__}.{family}").register()
