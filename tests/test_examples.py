"""Every example runs and prints what it promises."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMISES = {
    "accelerate_diffusers.py": "adaLN-Zero block",
    "own_block.py": "compiled without a graph break: True",
    "stream_video.py": "21 frames of (64, 64), as many as in one piece: 21",
    "text_to_video.py": "17 frames of 64x64: a red circle moving right on blue",
}


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_example(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--tiny"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert PROMISES[name] in capsys.readouterr().out
