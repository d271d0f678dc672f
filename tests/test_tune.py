"""The tuner with a clock that is told what to say: candidates are tried, the winner written, the next call takes it."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("triton")

from fastdit import ops
from fastdit.backends.triton import _config
from fastdit.backends.triton._config import Config
from fastdit.cli import app, tune as view
from fastdit.testing import tune
from fastdit.testing.workloads import Maker, Workload

KERNEL = "modulation_forward"


def _make(m: Maker):
    return (m.randn(2, 6, 40),), dict(shift=m.randn(2, 40), scale=m.randn(2, 40))


CASE = (Workload("norm_modulate", "toy", "2x6x40", _make, lambda dtype: 1), torch.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_config, "FOLDER", tmp_path)
    _config.forget()
    yield tmp_path
    _config.forget()


def _favours(wanted):
    """Runs every call once, and reports the wanted candidate as twice as fast as the rest."""

    def clock(calls):
        for call in calls.values():
            call()
        return {config: 0.5 if config == wanted else 1.0 for config in calls}

    return clock


def test_every_candidate_is_timed_with_its_own_choice(folder):
    taken = []

    def clock(calls):
        for config, call in calls.items():
            seen = []
            real, _config.choose.__globals__["_forced"] = _config._forced, _Watch(seen)
            try:
                call()
            finally:
                _config.choose.__globals__["_forced"] = real
            taken.append((config, set(seen)))
        return dict.fromkeys(calls, 1.0)

    found = list(tune.trials([CASE], "cpu", clock))
    forward = next(t for t in found if t.kernel == KERNEL)
    assert {*_config.CANDIDATES[KERNEL], forward.default} == {*forward.seconds, *forward.failed}
    assert all(seen == {config} for config, seen in taken)
    assert tune.best(found) == {}  # equal times: the defaults stay


class _Watch(dict):
    """A table of forced choices that remembers what was put in."""

    def __init__(self, seen):
        super().__init__()
        self._seen = seen

    def __setitem__(self, kernel, config):
        self._seen.append(config)
        super().__setitem__(kernel, config)


def test_the_winner_is_written_and_taken(folder):
    wanted = _config.CANDIDATES[KERNEL][-1]
    status = view.run(Console(quiet=True), [CASE], "cpu", _favours(wanted), "none", folder / "trials.json")
    assert status == 0
    rows = json.loads((folder / "none.json").read_text())
    (name,) = (key for key in rows if key.startswith(f"{KERNEL}|float32,40"))
    assert Config(tuple(rows[name]["blocks"]), rows[name]["warps"], rows[name]["stages"]) == wanted
    args, kwargs = _make(Maker())
    ops.norm_modulate(*args, **kwargs, backend="triton")
    assert _config.chosen()[name] == wanted
    assert {t["kernel"] for t in json.loads((folder / "trials.json").read_text())["trials"]} >= {KERNEL}


def test_rows_are_added_to_the_table(folder):
    a, b = Config((1,), 4, 2), Config((2, 3), 8, 1)
    _config.save("none", {"kernel|x": a, "kernel|y": a})
    _config.save("none", {"kernel|y": b})
    assert _config.table("none") == {"kernel|x": a, "kernel|y": b}


def test_best_by_the_geometric_mean():
    default, one, other = Config((0,)), Config((1,)), Config((2,))

    def trial(*seconds):
        return tune.Trial("row", "k", default, ("k|x",), dict(zip((default, one, other), seconds, strict=False)))

    assert tune.best([trial(1.0, 0.5, 0.8), trial(2.0, 4.2, 1.6)]) == {"k|x": other}
    assert tune.best([trial(1.0, 0.5, 0.8), trial(2.0, 1.0)]) == {"k|x": one}  # other cannot run everywhere
    assert tune.best([trial(1.0, 0.99, 1.1)]) == {}


def test_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = CliRunner().invoke(app, ["bench", "--tune"])
    assert result.exit_code == 2 and "measures on a GPU" in result.output
