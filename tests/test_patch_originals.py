"""patch: the reference against diffusers' own patch embeddings and the layout that its models predict in."""

import copy
import inspect

import diffusers
import pytest
import torch
from diffusers.models.embeddings import CogVideoXPatchEmbed, PatchEmbed, get_2d_sincos_pos_embed
from diffusers.models.transformers.transformer_cosmos import CosmosPatchEmbed
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoPatchEmbed
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15PatchEmbed

from fastdit.reference import patch as reference
from fastdit.testing import close
from fastdit.testing.workloads import Maker

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])


def _hold(module, call, embed, x, dtype):
    """embed(module, x) against call(module, x): the original in fp64 is the truth, in the tested dtype the baseline."""
    module = module.to(dtype).requires_grad_(False)
    wide = copy.deepcopy(module).double()
    close.assert_close(embed(module, x), call(wide, x.double()), call(module, x))
    y, truth = embed(wide, x.double()), call(wide, x.double())
    assert (y - truth).abs().max() <= 1e-13 * truth.abs().max()


def _conv3d(module, x):
    return module(x).flatten(2).transpose(1, 2)


@each_dtype
@pytest.mark.parametrize("size", [(256, 256), (256, 384)], ids=["native", "other-size"])
def test_dit_patch_embed(dtype, size):
    # with its sincos table, or one in fp32 made for a size that is not the module's own
    module = PatchEmbed(height=32, width=32, patch_size=2, in_channels=4, embed_dim=1152)
    x = Maker(dtype).randn(2, 4, size[0] // 8, size[1] // 8)

    def embed(m, x):
        grid = (x.shape[-2] // 2, x.shape[-1] // 2)
        pos = m.pos_embed[0]
        if grid != (m.height, m.width):
            scale = dict(base_size=m.base_size, interpolation_scale=m.interpolation_scale)
            pos = get_2d_sincos_pos_embed(1152, grid, **scale, output_type="pt").float()
        return reference.patch_embed3d(x.unsqueeze(2), m.proj.weight.unsqueeze(2), m.proj.bias, pos=pos)

    _hold(module, lambda m, x: m(x), embed, x, dtype)


@each_dtype
@pytest.mark.parametrize("channels, dim", [(16, 1536), (36, 5120), (48, 3072)], ids=["1.3B", "14B-I2V", "5B"])
def test_wan_patch_embedding(dtype, channels, dim):
    # transformer_wan.py: Conv3d, flatten(2), transpose(1, 2)
    module = torch.nn.Conv3d(channels, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
    x = Maker(dtype).randn(1, channels, 3, 4, 6)
    _hold(module, _conv3d, lambda m, x: reference.patch_embed3d(x, m.weight, m.bias), x, dtype)


@each_dtype
@pytest.mark.parametrize(
    "module, channels, patch",
    [
        (lambda: HunyuanVideoPatchEmbed((1, 2, 2), 16, 3072), 16, (1, 2, 2)),
        (lambda: HunyuanVideo15PatchEmbed((1, 1, 1), 65, 2048), 65, (1, 1, 1)),
    ],
    ids=["HunyuanVideo", "HunyuanVideo1.5"],
)
def test_hunyuan_patch_embed(dtype, module, channels, patch):
    x = Maker(dtype).randn(1, channels, 3, 4, 6)
    _hold(module(), lambda m, x: m(x), lambda m, x: reference.patch_embed3d(x, m.proj.weight, m.proj.bias), x, dtype)


@each_dtype
@pytest.mark.parametrize("patch_t", [None, 2], ids=["1.0", "1.5"])
def test_cogvideox_patch_embed(dtype, patch_t):
    # frames before channels; 1.0 a Conv2d per frame, 1.5 a Linear over (c, pt, p, p)
    options = dict(use_positional_embeddings=False, use_learned_positional_embeddings=False)
    module = CogVideoXPatchEmbed(
        patch_size=2, patch_size_t=patch_t, in_channels=16, embed_dim=3072, text_embed_dim=8, **options
    )
    text = torch.zeros(1, 1, 8)

    def embed(m, x):
        return reference.patch_embed3d(x.transpose(1, 2), m.proj.weight.view(3072, 16, patch_t or 1, 2, 2), m.proj.bias)

    x = Maker(dtype).randn(1, 4, 16, 4, 6)
    _hold(module, lambda m, x: m(text.to(x.dtype), x)[:, 1:], embed, x, dtype)


@each_dtype
def test_cogvideox_positions(dtype):
    # the sincos table behind the text rows: rounded to the activation dtype, then added to a rounded embedding
    size = dict(sample_width=6, sample_height=4, sample_frames=9, max_text_seq_length=1)
    module = CogVideoXPatchEmbed(
        patch_size=2, in_channels=16, embed_dim=1920, text_embed_dim=8, use_learned_positional_embeddings=False, **size
    )
    text = torch.zeros(1, 1, 8)

    def embed(m, x):
        pos = m.pos_embedding[:, 1:].to(x.dtype)
        return reference.patch_embed3d(x.transpose(1, 2), m.proj.weight.unsqueeze(2), m.proj.bias, pos=pos)

    x = Maker(dtype).randn(1, 3, 16, 4, 6)
    _hold(module, lambda m, x: m(text.to(x.dtype), x)[:, 1:], embed, x, dtype)


@each_dtype
def test_cosmos_patch_embed(dtype):
    # a Linear without bias over (c, pt, ph, pw): the layout of a Conv3d's weight
    module = CosmosPatchEmbed(17, 2048, (1, 2, 2), bias=False)
    x = Maker(dtype).randn(1, 17, 3, 4, 6)
    _hold(
        module,
        lambda m, x: m(x).flatten(1, 3),
        lambda m, x: reference.patch_embed3d(x, m.proj.weight.view(2048, 17, 1, 2, 2)),
        x,
        dtype,
    )


def test_list_is_each_alone():
    m = Maker(torch.bfloat16)
    x = [m.randn(4, 1, 4, 6), m.randn(4, 3, 2, 2)]
    weight, pos = m.randn(32, 4, 1, 2, 2), m.randn(9, 32)
    y = reference.patch_embed3d(x, weight, pos=pos)
    for part, v, rows in zip(y.split([6, 3]), x, pos.split([6, 3]), strict=True):
        close.assert_bitwise(part, reference.patch_embed3d(v[None], weight, pos=rows)[0])


# ---- what the last layer predicts ---------------------------------------------------------------------
# Whole models, one tiny block: what enters the unpatchify lines and what leaves the model.
HEADS = dict(num_attention_heads=2, num_layers=1)
MODELS = {
    "DiT": (
        "DiTTransformer2DModel",
        dict(HEADS, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=8, patch_size=2),
        "proj_out_2",
        dict(grid=(1, 4, 4), patch=(1, 2, 2), channels=8, order="thwc"),
        lambda m: dict(hidden_states=m.randn(2, 4, 8, 8), timestep=m.index([3, 7]), class_labels=m.index([1, 2])),
    ),
    "Wan": (
        "WanTransformer3DModel",
        dict(HEADS, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=8, freq_dim=8, ffn_dim=8),
        "proj_out",
        dict(grid=(3, 2, 4), patch=(1, 2, 2), channels=16, order="thwc"),
        lambda m: dict(
            hidden_states=m.randn(2, 16, 3, 4, 8), timestep=m.index([3, 7]), encoder_hidden_states=m.randn(2, 5, 8)
        ),
    ),
    "HunyuanVideo": (
        "HunyuanVideoTransformer3DModel",
        dict(
            HEADS, attention_head_dim=10, in_channels=4, out_channels=4, num_single_layers=1, num_refiner_layers=1,
            patch_size=2, patch_size_t=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
            guidance_embeds=False,
        ),
        "proj_out",
        dict(grid=(3, 2, 4), patch=(1, 2, 2), channels=4, order="cthw"),
        lambda m: dict(
            hidden_states=m.randn(2, 4, 3, 4, 8), timestep=m.index([3, 7]), encoder_hidden_states=m.randn(2, 5, 8),
            encoder_attention_mask=torch.ones(2, 5), pooled_projections=m.randn(2, 8),
        ),
    ),
    "CogVideoX-1.0": (
        "CogVideoXTransformer3DModel",
        dict(
            HEADS, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
            sample_width=8, sample_height=4, sample_frames=9, max_text_seq_length=5,
        ),
        "proj_out",
        dict(grid=(3, 2, 4), patch=(1, 2, 2), channels=4, order="cthw"),
        lambda m: dict(
            hidden_states=m.randn(2, 3, 4, 4, 8), timestep=m.index([3, 7]), encoder_hidden_states=m.randn(2, 5, 8)
        ),
    ),
    "CogVideoX-1.5": (
        "CogVideoXTransformer3DModel",
        dict(
            HEADS, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
            sample_width=8, sample_height=4, sample_frames=13, max_text_seq_length=5, patch_size_t=2,
            use_rotary_positional_embeddings=True,
        ),
        "proj_out",
        dict(grid=(2, 2, 4), patch=(2, 2, 2), channels=4, order="cthw"),
        lambda m: dict(
            hidden_states=m.randn(2, 4, 4, 4, 8), timestep=m.index([3, 7]), encoder_hidden_states=m.randn(2, 5, 8)
        ),
    ),
    "Mochi": (
        "MochiTransformer3DModel",
        dict(HEADS, attention_head_dim=8, in_channels=4, pooled_projection_dim=8, text_embed_dim=8, time_embed_dim=4),
        "proj_out",
        dict(grid=(3, 2, 4), patch=(1, 2, 2), channels=4, order="thwc"),
        lambda m: dict(
            hidden_states=m.randn(2, 4, 3, 4, 8), timestep=m.index([3, 7]), encoder_hidden_states=m.randn(2, 5, 8),
            encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool),
        ),
    ),
    "Allegro": (
        "AllegroTransformer3DModel",
        dict(
            HEADS, attention_head_dim=24, in_channels=4, out_channels=4, cross_attention_dim=48, caption_channels=8,
            sample_width=8, sample_height=4, sample_frames=3,
        ),
        "proj_out",
        dict(grid=(3, 2, 4), patch=(1, 2, 2), channels=4, order="thwc"),
        lambda m: dict(
            hidden_states=m.randn(2, 4, 3, 4, 8), timestep=m.index([3, 7]), encoder_hidden_states=m.randn(2, 5, 8),
            attention_mask=torch.ones(2, 3, 4, 8), encoder_attention_mask=torch.ones(2, 5),
        ),
    ),
    "Cosmos": (
        "CosmosTransformer3DModel",
        dict(
            HEADS, attention_head_dim=16, in_channels=4, out_channels=4, text_embed_dim=8, adaln_lora_dim=4,
            max_size=(4, 32, 32), patch_size=(2, 2, 2), concat_padding_mask=False, extra_pos_embed_type=None,
        ),
        "proj_out",
        dict(grid=(2, 2, 4), patch=(2, 2, 2), channels=4, order="hwtc"),
        lambda m: dict(
            hidden_states=m.randn(2, 4, 4, 4, 8), timestep=m.index([3, 7]), encoder_hidden_states=m.randn(2, 5, 8)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_unpatchify(name):
    cls, config, last, layout, inputs = MODELS[name]
    cls = getattr(diffusers, cls)
    model = cls(**config).eval()
    kwargs = inputs(Maker())
    if "image_rotary_emb" in inspect.signature(cls.forward).parameters and config.get("patch_size_t"):
        tokens = layout["grid"][0] * layout["grid"][1] * layout["grid"][2]
        kwargs["image_rotary_emb"] = (torch.ones(tokens, 16), torch.zeros(tokens, 16))
    seen = []
    getattr(model, last).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        original = model(**kwargs, return_dict=False)[0]
    video = reference.unpatchify3d(seen[0].flatten(1, -2), **layout)
    if name == "DiT":
        video = video.squeeze(2)
    elif name.startswith("CogVideoX"):
        video = video.transpose(1, 2)
    close.assert_bitwise(video, original)
