"""Implementations of the ops and the choice between them: `registry`, and one folder of thin adapters per backend."""

from .registry import BACKENDS, Impl, NoBackend, set_backend, use_backend

__all__ = ["BACKENDS", "Impl", "NoBackend", "set_backend", "use_backend"]
