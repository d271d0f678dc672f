"""accelerate on one block of each codebase that has no test file of its own: one graph for two lengths, forks left."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import fastdit
from fastdit.integrations.registry import patched_modules
from fastdit.testing import close
from fastdit.testing.accelerated import check_autocast, check_one_graph, layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import (
    auraflow,
    bria_fibo2,
    cogview,
    easyanimate,
    ernie_image,
    flux3,
    helios,
    hidream,
    hunyuan_dit,
    krea2,
    lumina_next,
    motif,
    omnigen,
    qwen21,
    randn,
    text_mask,
    vae_svd,
    wan_animate2,
    z_image,
)


def streams(width: int, n: int, text: int) -> tuple:
    return torch.randn(2, n, width), torch.randn(2, text, width)


def angles(n: int, head_dim: int) -> tuple:
    table = torch.randn(n, head_dim // 2).repeat_interleave(2, dim=1)
    return table.cos(), table.sin()


def rows(width: int, n: int) -> torch.Tensor:
    return torch.randn(2, 1, width).expand(2, n, width)


def key_mask(n: int, text: int) -> torch.Tensor:
    return torch.cat([torch.ones(2, n), text_mask(text, 2, total=text)], dim=1).bool()[:, None, None]


def hidream_rest(n: int, text: int, context: torch.Tensor | None) -> tuple:
    """A mask over n keys, the text, the conditioning, a rotation of half of each head."""
    return text_mask(n, 3, total=n), context, torch.randn(2, 48), torch.randn(2, n + text, 1, 6, 2, 2)


@dataclass
class Block:
    """name: of the block in the model; call(n, text): its arguments for so many tokens."""

    build: Callable[[], Any]
    name: str
    call: Callable[[int, int], tuple]


BLOCKS = {
    "HunyuanDiT": Block(
        hunyuan_dit.hunyuan_dit,
        "blocks.0",
        lambda n, text: (torch.randn(2, n, 40), torch.randn(2, text, 24), torch.randn(2, 40), angles(n, 20)),
    ),
    "AuraFlow joint": Block(
        auraflow.auraflow,
        "joint_transformer_blocks.0",
        lambda n, text: (*streams(40, n, text), torch.randn(2, 40)),
    ),
    "AuraFlow single": Block(
        auraflow.auraflow,
        "single_transformer_blocks.0",
        lambda n, text: (torch.randn(2, n, 40), torch.randn(2, 40)),
    ),
    "CogView3+": Block(
        cogview.cogview3, "transformer_blocks.0", lambda n, text: (*streams(48, n, text), torch.randn(2, 28))
    ),
    "CogView4": Block(
        cogview.cogview4,
        "transformer_blocks.0",
        lambda n, text: (*streams(48, n, text), torch.randn(2, 28), angles(n, 24)),
    ),
    "GLM-Image": Block(
        cogview.glm_image,
        "transformer_blocks.0",
        lambda n, text: (*streams(48, n, text), torch.randn(2, 28), angles(n, 24)),
    ),
    "EasyAnimate": Block(
        easyanimate.easyanimate,
        "transformer_blocks.0",
        lambda n, text: (*streams(96, n, text), torch.randn(2, 20), angles(n, 32)),
    ),
    "Flux.3": Block(
        flux3.flux3,
        "single_transformer_blocks.0",
        lambda n, text: (*streams(48, n, text), rows(144, n), rows(144, text), angles(n + text, 24)),
    ),
    "Krea 2": Block(
        krea2.krea2,
        "transformer_blocks.0",
        lambda n, text: (torch.randn(2, n + text, 48), torch.randn(2, 1, 288), angles(n + text, 12), key_mask(n, text)),
    ),
    "Qwen-Image 2.1": Block(
        qwen21.qwen21,
        "transformer_blocks.0",
        lambda n, text: (
            *(torch.randn(2, n, 48), torch.randn(3, 4 * 48), torch.polar(torch.ones(n, 12), torch.randn(n, 12)), None),
            torch.arange(n) > text,
        ),
    ),
    "Helios": Block(
        helios.helios,
        "blocks.0",
        lambda n, text: (
            *(torch.randn(2, n, 48), torch.randn(2, text, 48), torch.randn(2, n, 6, 48)),
            *(torch.cat(angles(n, 24), dim=1).expand(2, n, 48), n - 4),
        ),
    ),
    "HiDream joint": Block(
        lambda: hidream.hidream(**hidream.HALF),
        "double_stream_blocks.0.block",
        lambda n, text: (torch.randn(2, n, 48), *hidream_rest(n, text, torch.randn(2, text, 48))),
    ),
    "HiDream single": Block(
        lambda: hidream.hidream(**hidream.HALF),
        "single_stream_blocks.0.block",
        lambda n, text: (torch.randn(2, n + text, 48), *hidream_rest(n + text, 0, None)),
    ),
    "Lumina-Next": Block(
        lumina_next.lumina_next,
        "layers.0",
        lambda n, text: (
            *(torch.randn(2, n, 96), torch.ones(2, n, dtype=torch.int32), lumina_next.rotation(1, n, 12)),
            *(torch.randn(2, text, 20), text_mask(text, 2, total=text).bool(), torch.randn(2, 96), {}),
        ),
    ),
    "OmniGen": Block(
        omnigen.omnigen,
        "layers.0",
        lambda n, text: (torch.randn(2, n + text, 48), torch.randn(2, 1, n + text, n + text), angles(n + text, 24)),
    ),
    "Bria FIBO 2": Block(
        bria_fibo2.fibo2,
        "layers.1",
        lambda n, text: (
            *(torch.randn(2, n, 72), torch.arange(n) < torch.tensor([[n], [7]])),
            *(
                torch.polar(torch.ones(1, n, 12), torch.randn(1, n, 12)),
                None,
                (torch.arange(n) > 5).long().expand(2, n),
            ),
            *(torch.randn(2, 72), torch.randn(2, 72), torch.randn(2, text, 20), text_mask(text, 2, total=text).bool()),
        ),
    ),
    "ERNIE-Image": Block(
        ernie_image.ernie_image,
        "layers.0",
        lambda n, text: (
            *(torch.randn(n + text, 2, 48), torch.randn(2, n + text, 1, 24)),
            *([torch.randn(1, 2, 48).expand(n + text, -1, -1) for _ in range(6)], key_mask(n, text)),
        ),
    ),
    "Motif-Video dual": Block(
        lambda: motif.motif(**motif.TEXT),
        "transformer_blocks.0",
        lambda n, text: (*streams(48, n, text), torch.randn(2, 48), key_mask(n, text), angles(n, 24)),
    ),
    "Motif-Video single": Block(
        lambda: motif.motif(**motif.TEXT),
        "single_transformer_blocks.0",
        lambda n, text: (*streams(48, n, text), torch.randn(2, 48), key_mask(n, text), angles(n, 24)),
    ),
}
QUICK = ("Flux.3",)  # rows that are one in memory; the others compile as blocks with tests of their own do


@pytest.mark.parametrize(
    "entry", [pytest.param(b, id=name, marks=() if name in QUICK else pytest.mark.full) for name, b in BLOCKS.items()]
)
@torch.no_grad()
def test_one_graph_for_two_lengths(entry):
    model = entry.build()
    fastdit.accelerate(model)
    check_one_graph(model.get_submodule(entry.name), [entry.call(15, 7), entry.call(24, 9)])


@pytest.mark.parametrize("entry", BLOCKS.values(), ids=BLOCKS)
def test_a_fork_is_left_whole(entry):
    model = entry.build()
    before = layers(fastdit.accelerate(model))
    block = model.get_submodule(entry.name)
    block.adapter = nn.Linear(4, 4)
    report = fastdit.accelerate(model)
    known = f"has adapter, which the {type(block).__name__} that is known does not have"
    assert {known, "inside a block that is left"} <= reasons(report)
    assert sum(before.values()) - sum(layers(report).values()) >= 2  # the block, its feed-forward, most attentions
    assert not any(patched_modules(block))


def test_another_norm_is_left():
    for model, name in (
        (hunyuan_dit.hunyuan_dit(), "blocks.0.norm2"),
        (auraflow.auraflow(), "single_transformer_blocks.0.norm2"),
        (cogview.cogview4(), "transformer_blocks.0.norm2"),
        (easyanimate.easyanimate(), "transformer_blocks.0.norm2.norm"),
        (hidream.hidream(), "double_stream_blocks.0.block.norm3_t"),
        (krea2.krea2(), "transformer_blocks.0.norm2"),
        (lumina_next.lumina_next(), "layers.0.norm1_context"),
        (omnigen.omnigen(), "layers.0.post_attention_layernorm"),
        (ernie_image.ernie_image(), "layers.0.adaLN_mlp_ln"),
        (bria_fibo2.fibo2(), "layers.1.cross_attn_norm2"),
        (bria_fibo2.fibo2(), "perceiver.layers.0.ffn_norm"),
        (wan_animate2.animate2(), "blocks.0.norm2"),
    ):
        model.set_submodule(name, nn.BatchNorm1d(4))
        assert any(why.startswith("its norm is a BatchNorm1d, not a") for why in reasons(fastdit.accelerate(model)))


def test_a_norm_of_another_formula_is_left(monkeypatch):
    """Krea 2's has the weight 1 + w."""
    model = krea2.krea2()
    norm = type(model.final_layer.norm)
    monkeypatch.setattr(norm, "forward", lambda self, x: nn.functional.rms_norm(x, (self.dim,), self.weight, self.eps))
    report = fastdit.accelerate(model)
    assert not layers(report) and "its norm is a Krea2RMSNorm, not a zero-centred RMSNorm" in reasons(report)


@torch.no_grad()
def test_modulation_of_equal_tokens_is_made_once():
    """FLUX.3 expands a row over its tokens; that of the image goes through a SiLU behind, and is dense."""
    model, sizes = flux3.flux3(), []
    modulations = [*model.early_stream_modulations.values(), *model.single_stream_modulations.values(), model.norm_out]
    for module in modulations:
        module.linear.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))
    given = flux3.inputs(reference=True)
    model(**given)
    assert sorted(sizes) == [6, 6, 7, 7, 15, 15, 15]
    sizes.clear()
    fastdit.accelerate(model)
    model(**given)
    assert sorted(sizes) == [1, 1, 1, 1, 1, 15, 15]


@torch.no_grad()
def test_a_mask_of_weights_goes_to_the_original(monkeypatch):
    model = krea2.krea2(num_layers=1)
    x, temb, rotary, mask = BLOCKS["Krea 2"].call(15, 7)
    weights = torch.where(mask, 0.0, -3.0)
    with no_rounding():
        truth = exact(model).transformer_blocks[0](x.double(), temb.double(), rotary, weights.double())
    block = model.transformer_blocks[0]
    before = block(x, temb, rotary, weights)
    fastdit.accelerate(model)
    close.assert_close(block(x, temb, rotary, weights), truth, before)
    monkeypatch.setattr(block.attn.processor, "original", lambda *args: pytest.fail("the original was called"))
    block(x, temb, rotary, mask)


def test_experts_in_training():
    """A token goes to two of four experts; the others get none, and a gradient of 0."""

    def gradients(layer, x):
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        return torch.cat([g.flatten() for g in (leaf.grad, *(p.grad for p in layer.parameters()))])

    model = hidream.hidream(num_routed_experts=4, force_inference_output=False).train()
    layer, x = model.double_stream_blocks[0].block.ff_i, torch.randn(1, 1, 48)
    with no_rounding():
        truth = gradients(exact(layer), x.double())
    before = gradients(layer, x)
    assert len(layer.experts) == 4 and sum(bool(e.w1.weight.grad.any()) for e in layer.experts) == 2
    fastdit.accelerate(model)
    layer.zero_grad()
    close.assert_close(gradients(layer, x), truth, before)


def test_other_parts_are_left():
    model = lumina_next.lumina_next()
    model.layers[0].norm1.silu = nn.GELU()
    model.layers[1].attn2.norm_k.eps = 0.5
    assert reasons(fastdit.accelerate(model)) >= {
        "its modulation is a LuminaRMSNormZero, not SiLU, linear layer and norm",
        "its query and key norms differ",
    }
    model = omnigen.omnigen(num_key_value_heads=1)
    model.layers[0].mlp.activation_fn = nn.GELU()
    assert reasons(fastdit.accelerate(model)) >= {
        "its keys have fewer heads, which the original does not cover either",
        "its activation is GELU, not SiLU",
    }


@torch.no_grad()
def test_calls_that_go_to_the_original():
    """Keys at positions of their own; a mask over tokens that is one for all heads and samples."""
    model, x = lumina_next.lumina_next(), torch.randn(2, 9, 96)
    tables = lumina_next.rotation(1, 9, 12), lumina_next.rotation(1, 10, 12)[:, 1:]
    given = dict(attention_mask=torch.ones(2, 9), query_rotary_emb=tables[0], key_rotary_emb=tables[1])
    before = model.layers[0].attn1(x, x, **given)
    fastdit.accelerate(model)
    close.assert_bitwise(model.layers[0].attn1(x, x, **given), before)
    model, x = omnigen.omnigen(), torch.randn(2, 9, 48)
    given = dict(attention_mask=torch.randn(9, 9), image_rotary_emb=angles(9, 24))
    before = model.layers[0].self_attn(x, x, **given)
    fastdit.accelerate(model)
    close.assert_bitwise(model.layers[0].self_attn(x, x, **given), before)


def double(tree):
    return tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


def check_block(model, name, *args):
    """The block of this name, as it was and accelerated, on these arguments."""
    with no_rounding():
        truth = exact(model).get_submodule(name)(*double(args))
    block = model.get_submodule(name)
    before = block(*args)
    fastdit.accelerate(model)
    after = block(*args)
    assert after.dtype is before.dtype
    close.assert_close(after, truth, before)


@torch.no_grad()
def test_ernie_image_is_given_rows_of_samples():
    """The original writes each table out for all tokens; a block that is left reads what the others do."""
    model, given, strides = ernie_image.ernie_image(), ernie_image.inputs(7, 3), []
    with no_rounding():
        truth = exact(model)(**double(given)).sample
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda block, args: strides.append({t.stride(0) for t in args[2]}))
    before = model(**given).sample
    fastdit.accelerate(model, exclude=["layers.1"])
    close.assert_close(model(**given).sample, truth, before)
    assert strides == [{96}, {96}, {0}, {0}]


ERNIE = (randn(9, 2, 48), randn(2, 9, 1, 24, seed=2), [randn(9, 2, 48, seed=s) for s in range(3, 9)], key_mask(5, 4))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="a row per token"),
        pytest.param({1: ERNIE[1][..., :16]}, id="fewer channels rotate"),
        pytest.param({1: None, 3: None}, id="no angles, no mask"),
        pytest.param({3: randn(2, 1, 9, 9)}, id="a mask of weights"),
    ],
)
@torch.no_grad()
def test_ernie_image_block(change):
    check_block(ernie_image.ernie_image(num_layers=1), "layers.0", *(change.get(i, a) for i, a in enumerate(ERNIE)))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({8: text_mask(3, 5, total=7).flip(1).bool()}, id="a text padded at the front"),
        pytest.param({8: randn(2, 1, 1, 7)}, id="a text with weights"),
        pytest.param({3: randn(2, 72, seed=3), 4: None}, id="one row per sample, text between"),
    ],
)
@torch.no_grad()
def test_bria_fibo2_block(change):
    given = BLOCKS["Bria FIBO 2"].call(15, 7)
    check_block(bria_fibo2.fibo2(), "layers.1", *(change.get(i, a) for i, a in enumerate(given)))


AUTOCAST = (
    bria_fibo2.MODELS[0],
    ernie_image.MODELS[0],
    krea2.MODELS[0],
    replace(z_image.MODELS[1], build=lambda: z_image.z_image(n_refiner_layers=2)),
)


@pytest.mark.parametrize("entry", AUTOCAST, ids=str)
@torch.no_grad()
def test_under_autocast(entry):
    """Tokens come narrower than the norms' weights, and widen; what leaves an attention stays narrow."""
    model = entry.build()
    with no_rounding():
        truth = entry.call(exact(model), entry.given(torch.float64))
    check_autocast(model, lambda model: entry.call(model, entry.inputs()), truth)


@torch.no_grad()
def test_another_processor_keeps_the_decoder():
    """The decoder hands videos to its layers only where all of them take some."""
    from diffusers.models.attention_processor import AttnProcessor

    model, given = vae_svd.svd_vae(), vae_svd.inputs()
    truth, before = exact(model).decode(given["z"].double(), given["num_frames"]).sample, model.decode(**given).sample
    fastdit.accelerate(model)
    model.set_attn_processor(AttnProcessor())
    close.assert_close(model.decode(**given).sample, truth, before)
    model = vae_svd.svd_vae()
    model.set_attn_processor(AttnProcessor())
    assert "its processor is AttnProcessor, not AttnProcessor2_0" in reasons(fastdit.accelerate(model))


def test_another_blend_keeps_the_decoder():
    model = vae_svd.svd_vae()
    model.decoder.up_blocks[0].resnets[1].time_mixer.merge_strategy = "fixed"
    assert "its merge is fixed, not learned" in reasons(fastdit.accelerate(model))
