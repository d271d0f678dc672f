"""accelerate on diffusers' Cosmos 3: compilation, autocast, what stays."""

import copy

import torch
from torch import nn

import fastdit
from fastdit.testing.accelerated import check_autocast, check_one_graph, layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import cast_tree, cosmos3, randn


def arguments(*lengths):
    """Of a layer: text, what is generated, the rotary tables of both."""
    angles = [randn(n, 10).repeat(1, 2) for n in lengths]
    return *(randn(n, 48, seed=n) for n in lengths), tuple(f(a) for a in angles for f in (torch.cos, torch.sin))


@torch.no_grad()
def test_compiled_layer():
    """One graph for all lengths of text and of what is generated, with a norm of its own for the text's keys."""
    model = cosmos3.cosmos3(num_hidden_layers=1, qk_norm_for_text=False, use_und_k_norm_for_gen=True)
    fastdit.accelerate(model)
    check_one_graph(model.layers[0], (arguments(*lengths) for lengths in ((5, 18), (9, 12))))


@torch.no_grad()
def test_autocast():
    """Of one layer: the model itself adds tensors of two dtypes under autocast, and raises."""
    layer, given = cosmos3.cosmos3(num_hidden_layers=1).layers[0], arguments(5, 18)
    with no_rounding():
        truth = torch.cat(exact(layer)(*cast_tree(given, torch.float64)))
    check_autocast(layer, lambda layer: torch.cat(layer(*given)), truth)


def test_what_stays():
    from diffusers.models.normalization import RMSNorm

    model = cosmos3.cosmos3(num_hidden_layers=5)
    stay = model.layers
    stay[0].post_attention_layernorm = nn.LayerNorm(48)
    stay[1].self_attn.norm_k = nn.Identity()
    stay[1].mlp.act_fn = nn.ReLU()
    stay[2].self_attn.processor = copy.copy(stay[2].self_attn.processor)
    stay[2].self_attn.processor._attention_backend = "native"
    stay[3].adapter = nn.Linear(2, 2)
    stay[4].input_layernorm = RMSNorm(48, eps=1e-6, elementwise_affine=False)
    report = fastdit.accelerate(model)
    assert layers(report) == {"Cosmos 3 layer": 2, "feed-forward (SwiGLU of three linear layers)": 3}
    assert reasons(report) >= {
        "its norm is a LayerNorm, not an RMSNorm with a weight",
        "its norm is a RMSNorm, not an RMSNorm with a weight",
        "its query and key norms differ",
        "its activation is ReLU, not SiLU",
        "another attention backend was chosen for it",
        "has adapter, which the Cosmos3VLTextMoTDecoderLayer that is known does not have",
    }
