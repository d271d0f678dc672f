"""The stages of `make gpu` without a GPU: what they run, what they keep when something dies, and their files."""

import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ledger
import pytest

from fastdit.testing import bench, gpu, pytests, stages, supervise, whole
from fastdit.testing.supervise import Item
from fastdit.testing.workloads import samples

# The child of a run whose second item fails, whose third one dies, whose fourth one hangs; the fifth loses the context.
CHILD = f"""
import os, sys, time
sys.path.append({str(Path(supervise.__file__).parent)!r})
from supervise import Item, work
lost = []
def fail(): raise ValueError("no such tile")
items = [Item("fine", lambda: dict(rows=[1])), Item("fails", fail), Item("dies", lambda: os._exit(7)),
         Item("hangs", lambda: time.sleep(60)), Item("loses", lambda: lost.append(1) or dict(rows=[2])),
         Item("last", lambda: dict(rows=[3]))]
sys.exit(work(items, int(sys.argv[-1]), lambda: "the context was lost" if lost else None))
"""


def supervised(code, items, deadline=60.0):
    kept = {}
    supervise.supervise([sys.executable, "-c", code], items, time.monotonic() + deadline, kept.__setitem__)
    assert list(kept) == list(range(len(items)))
    return [found.get("rows", found.get("error")) for found in kept.values()]


def items(*seconds):
    return [Item(str(i), dict, s) for i, s in enumerate(seconds)]


def test_what_is_lost_is_an_item():
    found = supervised(CHILD, items(30, 30, 30, 1.0, 30, 30))
    lost = ["its process ended with status 7", "stopped after 1 s", "the context was lost"]
    assert found == [[1], "ValueError: no such tile", *lost, [3]]


def test_the_deadline_leaves_out_what_it_must():
    assert supervised(CHILD, items(30, 30), deadline=0.0) == [supervise.UP] * 2
    hanging = "import time; time.sleep(60)"
    assert supervised(hanging, items(30, 30), deadline=0.3) == [supervise.UP, "its process did not start"]


def test_a_child_that_cannot_start_is_not_started_again():
    found = supervised("import sys; sys.exit(4)", items(30, 30, 30))
    assert found == ["its process ended with status 4"] + 2 * ["its process did not start"]


def test_every_row_has_one_stage():
    names = [item.name for stage in stages.STAGES for item in stages.STAGES[stage].items(False)]
    assert len(set(names)) == len(names)
    for row, dtype in bench.cases(suite="gpu"):
        assert {f"{row} {bench.label(dtype)} {p}" for p in ("fwd", "bwd")} <= set(names)
    for row, dtype in whole.cases(suite="gpu"):
        assert f"{row} {bench.label(dtype)}" in names


def test_every_item_ends_before_a_lent_machine_does():
    for name, stage in stages.STAGES.items():
        assert max(item.seconds for item in stage.items(False)) < stages.LONGEST, name


def test_sanitizer_runs_samples_that_exist():
    assert set(pytests.TRITON_SAMPLES) <= {str(s) for s in samples()}


def test_correct_runs_every_file_of_kernel_tests():
    chosen = {f for files, *_ in pytests.CORRECT.values() for f in pytests._files(files)}
    marks = re.compile(r"^(from cuda_place import|@?(\w+ = )?pytest\.mark\.gpu\b)", re.MULTILINE)
    tests = Path(__file__).parent.glob("test_*.py")
    marked = {f"tests/{path.name}" for path in tests if marks.search(path.read_text("utf-8"))}
    assert marked <= chosen and len(marked) >= 12


def test_file_of_a_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTDIT_RESULTS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert stages.run(["bench-patch"], budget=400.0, dry=True) == 0
    (file,) = tmp_path.glob("*/*-bench-patch.json")
    found = json.loads(file.read_text())
    assert found["complete"] and {row["op"] for row in found["rows"]} == {"patch_embed3d", "unpatchify3d"}
    assert found["machine"]["date"] and found["peers"]["liger-kernel"] and not list(tmp_path.glob("*/*.part"))
    assert [item["name"] for item in found["items"]] == [i.name for i in stages.STAGES["bench-patch"].items(True)]
    assert str(file) in capsys.readouterr().out


def test_ceilings_have_a_figure_each():
    for item in stages.STAGES["ceilings"].items(True):
        ((name, figure),) = item.run()["ceilings"].items()
        assert name == item.name and figure > 0


def test_unknown_stage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stages", "bench-norms"])
    assert stages.main() == 2 and "unknown stage; got bench-norms, expected some of ceilings" in capsys.readouterr().out


# ---- what pytest said ---------------------------------------------------------------------------------------
def line(outcome, error=""):
    return json.dumps(dict(test=f"test_{outcome}", outcome=outcome, seconds=1.0, error=error))


@pytest.mark.parametrize(
    "status, lines, error",
    [
        (0, [line("passed"), line("skipped", "no FA3")], None),
        (1, [line("passed"), line("failed", "NaN")], "1 failed"),
        (None, [line("passed"), '{"test": "cut o'], "stopped before the end"),
        (5, [], "no test ran, pytest ended with 5"),
        (pytests.ERRORS, [line("passed")], "compute-sanitizer found errors"),
    ],
)
def test_verdict(status, lines, error):
    found = pytests._verdict(status, lines, "what was printed")
    assert found.get("error") == error and found["tests"]["status"] == status
    if lines:
        assert found["tests"]["passed"] == 1 and found["tests"]["slowest"] == {"test_passed": 1.0}
    assert ("output" in found["tests"]) == (error is not None)


def test_a_line_for_each_test(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIT_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(ledger, "_seconds", ledger.Counter())
    monkeypatch.setattr(ledger, "_tests", ledger.Counter())
    for when, outcome, longrepr in (
        ("setup", "passed", None),
        ("call", "passed", None),
        ("call", "failed", SimpleNamespace(reprcrash=SimpleNamespace(message="got 1, expected 2"))),
        ("setup", "skipped", ("file.py", 3, "Skipped: no card")),
    ):
        passed = outcome == "passed"
        ledger.pytest_runtest_logreport(
            SimpleNamespace(nodeid="a::b", duration=0.5, when=when, outcome=outcome, passed=passed, longrepr=longrepr)
        )
    lines = [json.loads(text) for text in (tmp_path / "log").read_text().splitlines()]
    assert [(r["outcome"], r["error"]) for r in lines] == [
        ("passed", ""), ("failed", "got 1, expected 2"), ("skipped", "Skipped: no card"),
    ]  # fmt: skip


def test_peers_are_named_with_their_state(monkeypatch):
    monkeypatch.setattr(gpu, "PEERS", {"torch": "torch", "no_such_module": "no-such", "json": "no-such-json"})
    found = gpu.present()
    assert found["torch"][0].isdigit() and found["no-such"] == "absent" and "unknown" in found["no-such-json"]
