"""torch's own scaled_dot_product_attention as a backend, for the calls it can express."""

import importlib

FAMILIES = ("attention",)


def register_all() -> None:
    for family in FAMILIES:
        importlib.import_module(f"{__name__}.{family}").register()
