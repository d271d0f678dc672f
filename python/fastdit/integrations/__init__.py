"""`accelerate(model)`: the layers of an existing DiT or VAE through fastdit's ops; `restore(model)` undoes it."""

from fastdit.integrations import (  # noqa: F401  they register their kinds
    diffusers_dit,
    diffusers_feedforward,
    diffusers_wan,
    diffusers_wan_vae,
    diffusers_wan_vae_loop,
)
from fastdit.integrations._accelerate import accelerate, restore
from fastdit.integrations.registry import KINDS, Kind, register
from fastdit.integrations.report import Report, Row, Verification

__all__ = ["KINDS", "Kind", "Report", "Row", "Verification", "accelerate", "register", "restore"]
