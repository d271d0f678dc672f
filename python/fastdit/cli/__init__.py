"""The command line: `app` names the commands, each has a module of its own."""

from .app import app, main

__all__ = ["app", "main"]
