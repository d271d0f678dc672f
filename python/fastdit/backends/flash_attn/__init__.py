"""Dao-AILab's FlashAttention 2, 3 and 4 as a backend, whichever is installed; imported by the first call that asks."""

from __future__ import annotations

from .. import registry

FAMILIES = ("attention",)


def register_all() -> None:
    from . import attention

    if not attention.installed():
        registry.mark_unavailable(
            "flash_attn",
            "no flash_attn, flash_attn_interface, fa3_fwd_interface or flash_attn.cute is installed; "
            "pip install 'fastdit[flash-attn]'",
        )
        return
    attention.register()
