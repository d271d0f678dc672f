"""accelerate on facebookresearch/DiT and its forks: what counts is what a block computes."""

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import check_autocast, layers, reasons
from fastdit.testing.exact import exact
from fastdit.testing.zoo import dit_native
from fastdit.testing.zoo.dit_native import DiTBlock, dit, inputs, modulate


class GateFirst(DiTBlock):
    """The same parts and names; the rows of the modulation in another order."""

    def forward(self, x, c):
        gate_msa, shift_msa, scale_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class NoOnePlus(DiTBlock):
    def forward(self, x, c):
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
        x = x + gate * self.attn(self.norm1(x) * scale + shift)
        return x + gate2 * self.mlp(self.norm2(x) * scale2 + shift2)


class WithFlag(DiTBlock):
    """Reads a setting that the known block does not have."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.skip = 1.0

    def forward(self, x, c):
        return super().forward(x, c) if self.skip else x


class Inlined(DiTBlock):
    """The known formula, written another way."""

    def forward(self, x, c):
        rows = self.adaLN_modulation(c)[:, None].unflatten(-1, (6, -1)).unbind(-2)
        x = x + self.attn(self.norm1(x) * (1 + rows[1]) + rows[0]) * rows[2]
        return x + self.mlp(self.norm2(x) * (1 + rows[4]) + rows[3]) * rows[5]


def fork(kind):
    return dit(type("Fork", (dit_native.DiT,), {"block": kind}))


def run(model):
    return dit_native.call(model, inputs())


def truth_of(model):
    return dit_native.call(exact(model), {k: v.double() if k == "x" else v for k, v in inputs().items()})


@pytest.mark.parametrize("kind", [GateFirst, NoOnePlus, WithFlag])
@torch.no_grad()
def test_a_fork_with_another_formula_is_left_whole(kind):
    model = fork(kind)
    before = run(model)
    report = fastdit.accelerate(model)
    assert not any(row.replaced for row in report.rows if "block" in row.layer or "attention" in row.layer)
    assert any("something else than an adaLN-Zero block" in row.why for row in report.rows)
    assert all("forward" not in m.__dict__ for m in model.blocks.modules())
    assert run(model).shape == before.shape


@torch.no_grad()
def test_the_same_formula_in_other_words_is_known():
    model = fork(Inlined)
    truth, before = truth_of(model), run(model)
    report = fastdit.accelerate(model)
    assert layers(report) == dit_native.LAYERS
    close.assert_close(run(model), truth, before)


@torch.no_grad()
def test_masks_and_dropout_go_to_the_original():
    """timm's newer Attention takes masks."""

    class Masked(dit_native.Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x) if attn_mask is None and not is_causal else torch.full_like(x, 7.0)

    model = fork(type("Block", (DiTBlock,), {"attention": Masked}))
    fastdit.accelerate(model)
    attn, x = model.blocks[0].attn, torch.randn(2, 5, 48)
    assert (attn(x, attn_mask=torch.zeros(5, 5)) == 7).all() and (attn(x, is_causal=True) == 7).all()
    assert not (attn(x) == 7).any()


@torch.no_grad()
def test_autocast():
    model, given = dit(), inputs()
    truth = truth_of(model)
    check_autocast(model, lambda m: dit_native.call(m, given), truth)


@torch.no_grad()
def test_compiled_block():
    model = dit()
    fastdit.accelerate(model)
    block = model.blocks[1]
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    for tokens in (16, 40):
        x, c = torch.randn(3, tokens, 48), torch.randn(3, 48)
        close.assert_bitwise(compiled(x, c), block(x, c))


def test_what_stays():
    model = dit()
    model.blocks[0].norm1 = nn.RMSNorm(48)
    model.blocks[1].attn.q_norm = nn.GroupNorm(1, 16)
    report = fastdit.accelerate(model)
    assert {"its norm is not nn.LayerNorm", "its norm of the heads is a GroupNorm"} <= reasons(report)
    assert "forward" in model.blocks[1].__dict__ and "forward" not in model.blocks[1].attn.__dict__
