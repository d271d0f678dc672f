"""Muon takes the matrices and kernels of the blocks, AdamW the rest, each at its rate; what is kept goes on."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastdit.nn import ChannelNorm
from fastdit.testing import training
from fastdit.testing.close import assert_all_bitwise
from fastdit.training.config import Optimizer
from fastdit.training.optimizer import Optimizers

MUON = Optimizer(kind="muon", lr=1e-3, muon_lr=0.02)


class Model(nn.Module):
    """A matrix, a kernel and a norm's gain in a block, and a matrix that is adaLN's; one matrix outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleDict({"wide": nn.Linear(8, 24), "adaLN_modulation": nn.Linear(4, 8)})
        self.block.update({"conv": nn.Conv3d(4, 6, (1, 3, 3)), "norm": ChannelNorm(4)})
        self.outside = nn.Linear(8, 8, bias=False)
        for n, p in enumerate(self.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))


def optimizers(model, config=MUON):
    return Optimizers(dict(model.named_parameters()), [model.block], config)


def test_who_takes_what():
    model = Model()
    found = optimizers(model)
    kinds = {name: set(found.kept(name)) for name in found.named}
    assert kinds.pop("block.wide.weight") == kinds.pop("block.conv.weight") == {"momentum_buffer"}
    assert len(kinds) == 6 and all(kind == {"exp_avg", "exp_avg_sq", "step"} for kind in kinds.values())
    assert set(optimizers(model, Optimizer()).kept("block.wide.weight")) == {"exp_avg", "exp_avg_sq", "step"}


def test_steps():
    """At half the rate: AdamW's first step is lr * sign(g), Muon's as good as orthogonal and lr * sqrt(rows / columns)
    long in each direction."""
    model = Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers(model).step(MUON.lr / 2)
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    for name, ratio in {"block.wide.weight": 24 / 8, "block.conv.weight": 1.0}.items():  # rows / columns, 1 at least
        lengths = torch.linalg.svdvals(moved.pop(name).flatten(1)) / (MUON.muon_lr / 2 * math.sqrt(ratio))
        assert lengths.min() > 0.5 and lengths.max() < 1.3  # five iterations end in this range
    for name, p in model.named_parameters():
        if name in moved:
            torch.testing.assert_close(moved[name], MUON.lr / 2 * p.grad.sign(), rtol=1e-3, atol=1e-6)


def test_going_on():
    """Three steps are one and then two of another optimiser with what the first kept."""
    whole, first = Model(), Model()
    one, early = optimizers(whole), optimizers(first)
    early.step(1e-3)
    second = Model()
    second.load_state_dict(first.state_dict())
    late = optimizers(second)
    for name in late.named:
        for kind, target in late.kept(name).items():
            target.copy_(early.kept(name)[kind])
    for _ in range(3):
        one.step(1e-3)
    for _ in range(2):
        late.step(1e-3)
    assert_all_bitwise(second.state_dict().values(), whole.state_dict().values())


def test_the_text_encoder_takes_part(tmp_path):
    config = training.smoke()
    config = replace(config, dit=replace(config.dit, optimizer=MUON))
    made = training.trainer("dit", config, tmp_path)
    taken = [name for name in made.named if "momentum_buffer" in made.optimizers.kept(name)]
    assert any(name.startswith("text.blocks.") for name in taken)
    assert any(name.startswith("dit.blocks.") for name in taken)
    assert not any("adaLN" in n or "embedder" in n or "final" in n or n == "text.embedding.weight" for n in taken)


def test_the_vae_takes_part(tmp_path):
    config = training.smoke()
    config = replace(config, vae=replace(config.vae, optimizer=MUON))
    made = training.trainer("vae", config, tmp_path)
    taken = {name for name in made.named if "momentum_buffer" in made.optimizers.kept(name)}
    assert taken == {n for n in made.named if ".blocks." in n and "conv" in n and n.endswith("weight")}


def test_gradients_are_dropped():
    """Of a kernel too, which Muon sees as another tensor."""
    model = Model()
    made = optimizers(model)
    made.step(1e-3)
    made.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    made.step(1e-3)  # nothing to go by
    assert_all_bitwise(model.parameters(), before)


def test_no_matrices():
    model = Model()
    with pytest.raises(ValueError, match="optimizer: muon needs matrices or kernels; got blocks without any"):
        Optimizers(dict(model.named_parameters()), [model.block["norm"]], MUON)
