"""README.md is true: its example prints what it says, and every command that it names exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastdit import ops
from fastdit.cli import app

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.S) + re.findall(r"`((?:make|fastdit) [^`]+)`", TEXT))


def test_the_example_prints_what_it_says(tmp_path):
    block = TEXT.split("<!-- example: begin -->")[1].split("<!-- example: end -->")[0]
    code, expected = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", block, re.S).groups()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if "PYTHONPATH" in environment:  # relative entries are meant from here
        paths = environment["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).resolve()) for p in paths)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected.split()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"\bfastdit ([a-z]+)", SHELL))))
def test_named_commands_have_help(command):
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0 and "Example" in done.output


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", SHELL))))
def test_named_make_targets_exist(target):
    known = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert re.search(rf"^  {target} ", known, re.M), known


def test_options_in_the_readme_exist():
    for command, rest in re.findall(r"\bfastdit ([a-z]+)([^\n#`]*)", SHELL):
        text = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"]).output
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in text, f"fastdit {command} {option}"


def test_every_op_stands_in_the_kernel_table():
    rows = re.findall(r"^\| (`[^|]+) \|", TEXT, re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    helpers = {"explain", "rope_table", "next_cache", "pack", "unpack"}
    assert set(ops.__all__) - helpers <= named, sorted(set(ops.__all__) - helpers - named)


def test_links_lead_somewhere():
    prose = re.sub(r"```.*?```|`[^`]*`", "", TEXT, flags=re.S)
    targets = re.findall(r"\]\(([^)#:]+)\)", prose)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
