"""`fastdit.explain`: which backend a call would take, and why each other one would not."""

from __future__ import annotations

import importlib
import threading

from ..backends import registry


class _Probe(threading.local):
    calls: list[str] | None = None


probe = _Probe()


def explain(op: str, *args, **kwargs) -> str:
    """Prints one line per backend for `ops.<op>(*args, **kwargs)`: chosen, or the reason why not. Runs no kernel.

        >>> fastdit.explain("norm_modulate", x, shift=shift, scale=scale)
        norm_modulate
          cuda        no: needs a CUDA tensor; got cpu
          cpu         chosen
          reference   can run

    Raises the same errors as the call itself for bad input. Returns the text.
    """
    ops = importlib.import_module("fastdit.ops")
    function = getattr(ops, op, None)
    if function is None or op == "explain":
        raise ValueError(
            f"explain: unknown op; got {op!r}, expected one of {sorted(ops.__all__)}; see help(fastdit.ops)"
        )
    probe.calls = []
    try:
        function(*args, **kwargs)
    except _Explained:
        pass
    finally:
        lines, probe.calls = probe.calls, None
    text = "\n".join(lines or [f"{op}\n  resolved in Python: nothing to run"])
    print(text)
    return text


class _Explained(Exception):
    pass


def intercept(op: str, args: tuple, backend: str | None) -> None:
    """Called by Op instead of running while `explain` is under way."""
    rows = registry.decisions(op, args, backend)
    assert probe.calls is not None
    probe.calls.append("\n".join([op, *(f"  {name:<11} {verdict}" for name, verdict in rows)]))
    raise _Explained
