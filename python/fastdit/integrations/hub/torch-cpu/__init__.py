"""The kernel that `kernels` loads: the layers of the fastdit that is installed."""

from fastdit.integrations.hub import layers

__all__ = ["layers"]
