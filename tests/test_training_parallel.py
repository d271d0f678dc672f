"""DDP and FSDP2 on two processes train as one process does: the same losses and the same weights."""

import os
import subprocess
import sys

import pytest
import torch

from fastdit.testing import training
from fastdit.testing.close import assert_close
from fastdit.training import checkpoint, config as settings, loop, parallel, plot

STEPS = 6
SMALL = """
[vae]
clips = 8
held_out = 2
sizes = [[5, 32, 32]]
crops = [[5, 24, 24]]
pixels = 17280
[vae.model]
widths = [8, 8]
[vae.loop]
steps = 6
log_every = 1
evaluate_every = 3
save_every = 3
[dit]
clips = 12
held_out = 3
sizes = [[5, 32, 32], [9, 32, 48], [1, 48, 32]]
tokens = 96
[dit.model]
hidden_size = 64
depth = 2
num_heads = 2
text_size = 32
[dit.loop]
steps = 6
log_every = 1
evaluate_every = 3
save_every = 3
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A configuration file and a VAE."""
    path = tmp_path_factory.mktemp("small") / "small.toml"
    path.write_text(SMALL)
    training.untrained_vae(settings.load(path), path.parent)
    return path, settings.load(path)


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "fastdit", "train", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def curve(state):
    return torch.tensor([loss for _, loss in plot.read(state / "loss.csv")["loss"]], dtype=torch.float32)


@pytest.mark.parametrize("kind, mode", [("dit", "ddp"), ("dit", "fsdp"), ("vae", "fsdp")])
def test_two_processes_train_as_one(kind, mode, small, tmp_path):
    path, config = small
    compare(kind, mode, path, path.parent, config, tmp_path, STEPS, ("exp_avg",))


@pytest.mark.parametrize("mode", [pytest.param("ddp", marks=pytest.mark.full), "fsdp"])  # DDP: whole matrices, as alone
def test_two_processes_orthogonalise_as_one(mode, small, tmp_path):
    """Muon, whose products in bf16 soon tell one rounding from another: two steps."""
    path = tmp_path / "muon.toml"
    path.write_text(SMALL + '[dit.optimizer]\nkind = "muon"\n')
    compare("dit", mode, path, small[0].parent, settings.load(path), tmp_path, 2, ("exp_avg", "momentum_buffer"))


def compare(kind, mode, path, folder, config, out, steps, moments):
    """Losses, weights, averages and moments after `steps` of a training by two processes, with those of one."""
    vae = ["--vae", folder] if kind == "dit" else []
    options = ["--config", path, "--out", out, "--parallel", mode, "--device", "cpu", "--steps", steps]
    printed = torchrun(kind, *vae, *options)
    assert printed.count(f"{kind} step {steps}/{steps}") == 1  # one process speaks
    truth, baseline = (training.trainer(kind, config, folder, dtype=d) for d in (torch.float64, torch.float32))
    losses = [training.losses(one, steps) for one in (truth, baseline)]
    state = out / "state" / kind
    assert_close(curve(state), *losses, "losses")
    tensors, facts = checkpoint.read_tensors(state / loop.STATE)
    expected, usual = truth.state(), baseline.state()
    assert facts["step"] == steps and tensors.keys() == expected.keys()
    for part in ("model", "ema", *moments):
        names = [name for name in tensors if name.startswith(f"{part}.")]
        found, exact, plain = (torch.cat([t[n].flatten() for n in names]) for t in (tensors, expected, usual))
        assert_close(found, exact, plain, part)


def test_a_sharded_training_goes_on_in_one_process(small, tmp_path):
    path, config = small
    options = ["--config", path, "--vae", path.parent, "--out", tmp_path, "--device", "cpu"]
    torchrun("dit", *options, "--parallel", "fsdp", "--steps", 3)
    task = training.make("dit", config, tmp_path, path.parent)
    state = tmp_path / "state" / "dit"
    loop.fit(task, config.dit.optimizer, config.dit.loop, state, training.HERE, resume=True)
    exact = training.losses(training.trainer("dit", config, path.parent, dtype=torch.float64), STEPS)
    plain = training.losses(training.trainer("dit", config, path.parent), STEPS)
    assert_close(curve(state), exact, plain)


def test_unknown_mode():
    with pytest.raises(ValueError, match="parallel: unknown mode; got 'tp', expected ddp or fsdp"), parallel.join("tp"):
        pass
