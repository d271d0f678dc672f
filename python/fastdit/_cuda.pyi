"""The compiled CUDA kernels: pointers, sizes, strides and streams as ints; called by fastdit.backends.cuda only."""

from typing import Any

def __getattr__(name: str) -> Any: ...
