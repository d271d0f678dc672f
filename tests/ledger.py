"""Where the test time went: seconds per file, slowest first, at the end of every run. Loaded by conftest.py.

FASTDIT_TEST_LOG names a file for a line of JSON per test, written as it ends (fastdit/testing/pytests.py).
"""

import json
import os
import time
from collections import Counter

_seconds: Counter[str] = Counter()
_tests: Counter[str] = Counter()
_began = time.perf_counter()


def pytest_runtest_logreport(report):
    name = report.nodeid.split("::")[0]
    _seconds[name] += report.duration
    if report.when == "call":
        _tests[name] += 1
    log = os.environ.get("FASTDIT_TEST_LOG")
    if log and "PYTEST_XDIST_WORKER" not in os.environ and (report.when == "call" or not report.passed):
        seconds = round(report.duration, 2)
        line = dict(test=report.nodeid, outcome=report.outcome, seconds=seconds, error=_reason(report))
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _reason(report) -> str:
    """The message of a failure or of a skip, without the traceback."""
    if report.longrepr is None:
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else report.longreprtext)[:1000]


def pytest_terminal_summary(terminalreporter):
    if len(_seconds) < 2:
        return
    terminalreporter.section("time ledger")
    for name, seconds in _seconds.most_common():
        terminalreporter.write_line(f"{seconds:8.1f} s  {_tests[name]:5d} tests  {name}")
    total, wall = sum(_seconds.values()), time.perf_counter() - _began
    terminalreporter.write_line(f"{total:8.1f} s  {sum(_tests.values()):5d} tests in all; {wall:.1f} s on the clock")
