"""`accelerate(model)`: the layers of an existing DiT or VAE through fastdit's ops, and back."""

from fastdit.integrations import diffusers_dit, diffusers_wan_vae  # registers its kinds
from fastdit.integrations.accelerate import accelerate, restore
from fastdit.integrations.registry import KINDS, Kind, register
from fastdit.integrations.report import Report, Row, Verification

__all__ = [
    "KINDS",
    "Kind",
    "Report",
    "Row",
    "Verification",
    "accelerate",
    "diffusers_dit",
    "diffusers_wan_vae",
    "register",
    "restore",
]
