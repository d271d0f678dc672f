"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, part: Path) -> Iterator[None]:
    """Inside the block `part`, in the folder of `path`, is written; then it takes the place of `path` in one step.

    When the block raises, `part` is removed and `path` is as it was. Folders on the way are made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
