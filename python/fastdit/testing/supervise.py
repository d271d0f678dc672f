"""Items that run one after the other in a process which may crash or hang: what is lost is an item, not the run.

A kernel that reads outside of its memory ends the CUDA context of its process, and one that waits for ever never ends.
So a child runs the items and tells on a pipe where it is (`work`), and its parent (`supervise`) stops a child that
takes too long and starts another one behind the item that was at fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PIPE = "FASTDIT_REPORT"  # the descriptor that a child writes to
UNTIL = "FASTDIT_UNTIL"  # the deadline that it was given, on the clock of time.monotonic()
UP = "the time of the stage was up"
START = 180.0  # seconds that a child has for its imports
Outcome = dict[str, Any]  # seconds, and error or what the item found


@dataclass(frozen=True)
class Item:
    """run: what it found, as JSON can hold it. seconds: the longest that it may take."""

    name: str
    run: Callable[[], dict[str, Any]]
    seconds: float = 120.0


# ---- the child ----------------------------------------------------------------------------------------------
def work(items: Sequence[Item], first: int, alive: Callable[[], str | None]) -> int:
    """Runs items[first:]. alive: why nothing can run here any more, asked after each item; None where all is well."""
    with os.fdopen(int(os.environ[PIPE]), "w", buffering=1) as pipe:

        def tell(**message: Any) -> None:
            pipe.write(json.dumps(message) + "\n")

        tell(at="ready")
        for i in range(first, len(items)):
            tell(at="begin", item=i)
            began = time.monotonic()
            try:
                found = items[i].run()
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"[:2000]}
            dead = alive()
            if dead is not None:
                found = {"error": found.get("error", dead)}
            tell(at="end", item=i, found={**found, "seconds": round(time.monotonic() - began, 2)})
            if dead is not None:
                return 3
    return 0


# ---- its parent ---------------------------------------------------------------------------------------------
def supervise(
    command: Sequence[str], items: Sequence[Item], deadline: float, keep: Callable[[int, Outcome], None]
) -> None:
    """Runs every item by `command + [first]`, a process that calls `work`, until `deadline` of time.monotonic().

    keep: called once for each item, in order. Items that the deadline left out are given the error `UP`.
    """
    at = 0
    while at < len(items) and time.monotonic() < deadline:
        before, told = at, False
        with _child([*command, str(at)], deadline) as (process, lines):
            began, running = time.monotonic(), False
            while at < len(items):
                patience = items[at].seconds if told else START
                message = lines.next(min(deadline, began + patience))
                if not message:
                    break
                told = True
                if message["at"] == "end":
                    keep(at, message["found"])
                    at += 1
                running, began = message["at"] == "begin", time.monotonic()
            else:
                return
            if message is None:
                late = time.monotonic() >= deadline
                keep(at, _lost(UP if late else f"stopped after {patience:.0f} s", began))
                at += 1
            elif running or at == before:
                status = process.wait()
                keep(at, _lost(f"its process ended with status {status}", began))
                at += 1
        if not told:  # nothing can start: so it will be with every other item
            for i in range(at, len(items)):
                keep(i, {"error": "its process did not start", "seconds": 0.0})
            return
    for i in range(at, len(items)):
        keep(i, {"error": UP, "seconds": 0.0})


def _lost(error: str, began: float) -> Outcome:
    return {"error": error, "seconds": round(time.monotonic() - began, 2)}


class _Lines:
    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._rest = descriptor, b""

    def next(self, until: float) -> dict[str, Any] | None:
        """The next message; {} where the pipe was closed, None where none came in time."""
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None
            data = os.read(self._descriptor, 1 << 16)
            if not data:
                return {}
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)


@contextlib.contextmanager
def _child(command: Sequence[str], deadline: float):
    """The process, in a group of its own that ends with the block, and the messages it writes."""
    read, write = os.pipe()
    environment = {**os.environ, PIPE: str(write), UNTIL: str(deadline)}
    try:
        process = subprocess.Popen(command, pass_fds=(write,), env=environment, stdout=2, start_new_session=True)
    finally:
        os.close(write)
    try:
        yield process, _Lines(read)
    finally:
        os.close(read)
        stop(process)


def stop(process: subprocess.Popen, patience: float = 20.0) -> None:
    """Ends the group that the process leads. One that is stuck in the driver is left behind after `patience`."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
