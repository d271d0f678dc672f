"""Where the test time went: seconds per file, slowest first, at the end of every run. Loaded by conftest.py."""

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


def pytest_terminal_summary(terminalreporter):
    if len(_seconds) < 2:
        return
    terminalreporter.section("time ledger")
    for name, seconds in _seconds.most_common():
        terminalreporter.write_line(f"{seconds:8.1f} s  {_tests[name]:5d} tests  {name}")
    total, wall = sum(_seconds.values()), time.perf_counter() - _began
    terminalreporter.write_line(f"{total:8.1f} s  {sum(_tests.values()):5d} tests in all; {wall:.1f} s on the clock")
