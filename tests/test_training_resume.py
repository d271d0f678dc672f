"""A training that is killed goes on as if it had not been; what is broken, full or of another training is told."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fastdit.testing import training
from fastdit.testing.close import assert_bitwise
from fastdit.training import CheckpointError, checkpoint, load, load_vae, loop, plot

KINDS = ("vae", "dit")
EVERY = {"log_every": 4, "evaluate_every": 8, "save_every": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training.untrained_vae(training.smoke(), tmp_path_factory.mktemp("vae"))


def fit(kind, out, folder, *, resume=False, config=None):
    """Train in this process; the folder of the state, and what was printed."""
    config = config or training.smoke(steps=16, **EVERY)
    part, state = getattr(config, kind), out / "state" / kind
    out.mkdir(exist_ok=True)
    with open(out / "log.txt", "w") as file:
        task = training.make(kind, config, out, folder)
        console = Console(file=file, width=300)
        loop.fit(task, part.optimizer, part.loop, state, training.HERE, resume=resume, console=console)
    return state, (out / "log.txt").read_text()


def curves(state):
    """Everything in loss.csv but the clock's readings."""
    return {name: rows for name, rows in plot.read(state / "loss.csv").items() if name != "steps_per_second"}


KILLED = """
import os, signal, sys
from pathlib import Path
from fastdit.testing import training
from fastdit.training import loop
from fastdit.training.trainer import Trainer

kind, out, folder, last, number = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
step = Trainer.step

def until(self, n):
    if n == last:
        os.kill(os.getpid(), number)
    return step(self, n)

Trainer.step = until
config = training.smoke(steps=16, log_every=4, evaluate_every=8, save_every=6)
part = getattr(config, kind)
task = training.make(kind, config, out, folder)
loop.fit(task, part.optimizer, part.loop, out / "state" / kind, training.HERE)
"""


def killed(kind, out, folder, last, number):
    out.mkdir()
    command = [sys.executable, "-c", KILLED, kind, str(out), str(folder), str(last), str(int(number))]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("kind", KINDS)
def test_kill_and_resume_give_the_same_curve(kind, folder, tmp_path):
    """SIGKILL two rows after the last checkpoint, which stands between two rows itself; then the same bits."""
    whole, _ = fit(kind, tmp_path / "whole", folder)
    done = killed(kind, tmp_path / "killed", folder, 10, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = tmp_path / "killed" / "state" / kind
    assert [n for n, _ in curves(state)["loss"]] == [4, 8]
    with (state / "loss.csv").open("a") as file:
        file.write("1")  # a torn row
    _, printed = fit(kind, tmp_path / "killed", folder, resume=True)
    assert "going on from step 6" in printed and curves(state) == curves(whole) and len(curves(whole)["loss"]) == 4
    a, b = load_file(whole / loop.STATE), load_file(state / loop.STATE)
    assert a.keys() == b.keys()
    for name in a:
        assert_bitwise(a[name], b[name], name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_saves_first(number, folder, tmp_path):
    done = killed("dit", tmp_path / "out", folder, 9, number)
    assert done.returncode == 0, done.stderr
    assert checkpoint.read_tensors(tmp_path / "out" / "state" / "dit" / loop.STATE)[1]["step"] == 10
    assert load(tmp_path / "out").dit is not None


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A DiT after 4 steps; tests copy what they break."""
    out = tmp_path_factory.mktemp("trained")
    fit("dit", out, folder, config=training.smoke(steps=4))
    return out


def copied(trained, tmp_path):
    subprocess.run(["cp", "-r", f"{trained}/.", str(tmp_path)], check=True)
    return tmp_path


class Full:
    """A disk without room from the `n`-th file on: half of the file is written."""

    def __init__(self, monkeypatch, n):
        self.left, self.save = n, save_file
        monkeypatch.setattr("safetensors.torch.save_file", self)

    def __call__(self, tensors, path, metadata):
        self.left -= 1
        if self.left >= 0:
            return self.save(tensors, path, metadata)
        self.save(tensors, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("n, left", [(0, 4), (1, 8)], ids=["state", "weights"])
def test_a_full_disk_leaves_the_last_checkpoint(n, left, trained, folder, tmp_path, monkeypatch):
    out = copied(trained, tmp_path)
    before = {path: path.read_bytes() for path in out.glob("*.safetensors")}
    Full(monkeypatch, n)
    message = (
        r"checkpoint: cannot write .*No space left.*the one before is untouched; free space and go on with --resume"
    )
    with pytest.raises(CheckpointError, match=message):
        fit("dit", out, folder, resume=True, config=training.smoke(steps=8))
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in out.glob("*.safetensors")} == before
    assert not list(out.rglob("*.part")) and load(out).dit is not None
    assert checkpoint.read_tensors(out / "state" / "dit" / loop.STATE)[1]["step"] == left
    fit("dit", out, folder, resume=True, config=training.smoke(steps=8))
    assert checkpoint.read_tensors(out / "state" / "dit" / loop.STATE)[1]["step"] == 8


def test_a_file_that_outgrows_the_limit_of_the_system(tmp_path):
    """Not a mock: the system refuses the bytes after the first 64 KiB."""
    script = (
        "import resource, sys, torch\nfrom pathlib import Path\nfrom fastdit.training import checkpoint\n"
        "path = Path(sys.argv[1])\ncheckpoint.write_tensors(path, {'a': torch.ones(10)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n    checkpoint.write_tensors(path, {'a': torch.zeros(100000)})\n"
        "except checkpoint.CheckpointError as error:\n    print(error)\n"
        "assert bool((checkpoint.read_tensors(path)[0]['a'] == 1).all()) and len(list(path.parent.iterdir())) == 1"
    )
    out = tmp_path / "folder" / "a.safetensors"
    done = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "checkpoint: cannot write" in done.stdout and "the one before is untouched" in done.stdout


def truncate(out):
    path = out / "state" / "dit" / loop.STATE
    os.truncate(path, path.stat().st_size // 2)


def other_tensors(out):
    path = out / "state" / "dit" / loop.STATE
    tensors, facts = checkpoint.read_tensors(path)
    checkpoint.write_tensors(path, {name: t for name, t in tensors.items() if "blocks.1" not in name}, facts)


def no_state(out):
    (out / "state" / "dit" / loop.STATE).unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (truncate, r"train.safetensors is broken or not ours; got .*expected a whole file"),
        (other_tensors, r"train.safetensors is of another model; got \d+ tensors, expected \d+"),
        (no_state, r"there is no .*train.safetensors"),
    ],
)  # fmt: skip
def test_a_state_that_cannot_go_on(spoil, message, trained, folder, tmp_path):
    out = copied(trained, tmp_path)
    spoil(out)
    with pytest.raises(CheckpointError, match=message):
        fit("dit", out, folder, resume=True)


def test_another_training(trained, folder, tmp_path):
    """Not over another training, not with another VAE or model; other settings go on and are told."""
    out = copied(trained, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds a training; got no --resume, expected it to go on"):
        fit("dit", out, folder)
    others = training.untrained_vae(training.smoke(seed=5), tmp_path / "vae")
    with pytest.raises(CheckpointError, match=r"train.safetensors is of another VAE; got \w{64}, expected \w{64}"):
        fit("dit", out, others, resume=True)
    config = training.smoke(steps=8)
    wider = replace(config, dit=replace(config.dit, model=replace(config.dit.model, hidden_size=32)))
    with pytest.raises(CheckpointError, match=r"train.safetensors is of another model; got .*64.*expected .*32"):
        fit("dit", out, folder, resume=True, config=wider)
    faster = replace(config, dit=replace(config.dit, optimizer=replace(config.dit.optimizer, lr=0.5)))
    _, printed = fit("dit", out, folder, resume=True, config=faster)
    assert "changed since the checkpoint: dit.optimizer.lr: 0.001 -> 0.5" in printed


def test_a_vae_of_another_width(folder, tmp_path):
    config = training.smoke()
    wider = replace(config, dit=replace(config.dit, model=replace(config.dit.model, in_channels=4)))
    message = (
        r"train dit: the VAE in .* does not fit the model; got 8 latent channels, expected dit.model.in_channels = 4"
    )
    with pytest.raises(CheckpointError, match=message):
        training.make("dit", wider, tmp_path, folder)


def rewritten(change):
    def spoil(out):
        document = json.loads((out / "config.json").read_text())
        change(document)
        (out / "config.json").write_text(json.dumps(document))

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda out: (out / "config.json").unlink(), r"checkpoint: .* holds none; got no config.json"),
        (lambda out: (out / "config.json").write_text("{"), r"config.json is broken; got "),
        (lambda out: (out / "config.json").write_text("[]"), r"config.json is broken; got format list, expected 1"),
        (rewritten(lambda d: d.update(format=9)), r"config.json is broken; got format 9, expected 1"),
        (rewritten(lambda d: d["dit"].update(speed=1)), r"does not describe a dit; got .*unknown key dit.speed"),
        (rewritten(lambda d: d["text"].pop("words")), r"does not describe a text; got KeyError\('words'\)"),
        (rewritten(lambda d: d["dit"].update(depth=3)), r"dit.safetensors does not fit VideoDiT; got \d+ tensors"),
        (rewritten(lambda d: d["vae"].update(widths=[8, 8])), r"vae.safetensors does not fit VideoVAE; .*other shapes"),
        (lambda out: (out / "vae.safetensors").unlink(), r"there is no .*vae.safetensors"),
        (lambda out: (out / "dit.safetensors").write_bytes(b"x" * 99), r"dit.safetensors is broken or not ours"),
    ],
)  # fmt: skip
def test_broken_folders(spoil, message, trained, tmp_path):
    out = copied(trained, tmp_path)
    spoil(out)
    with pytest.raises(CheckpointError, match=message):
        load(out)


def test_a_folder_with_a_vae_alone(folder):
    loaded = load(folder)
    assert loaded.dit is None and loaded.text is None
    assert_bitwise(loaded.vae.latent_std, load_vae(folder).latent_std)
    assert not loaded.vae.training
