"""`accelerate(model)`: the layers of an existing DiT or VAE through fastdit's ops; `restore(model)` undoes it.

Every other module here registers the kinds of layers of one codebase when it is imported.
"""

from importlib import import_module
from pkgutil import iter_modules

from fastdit.integrations._accelerate import accelerate, restore
from fastdit.integrations.registry import KINDS, Kind, register
from fastdit.integrations.report import Report, Row, Verification

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")

__all__ = ["KINDS", "Kind", "Report", "Row", "Verification", "accelerate", "register", "restore"]
