"""Triton kernels; the sources stand in the top-level folder `kernels/` and are installed here."""

from pathlib import Path

_tree = Path(__file__).resolve().parents[3]
if (_tree / "csrc").is_dir() and str(_tree / "kernels") not in __path__:  # a source tree that was not installed
    __path__.append(str(_tree / "kernels"))
