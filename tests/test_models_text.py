"""fastdit.models text encoders: words in plain PyTorch, packing, the null prompt, T5 and CLIP from a local folder."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import fastdit
from fastdit import ops
from fastdit.models import PretrainedEncoder, Text, VideoDiT, VideoDiTConfig, WordEncoder
from fastdit.testing import close
from fastdit.testing.models import randomize

WORDS = ("a", "red", "blue", "circle", "square", "moving", "right", "left-handed")
PROMPTS = ["a red circle moving right", "", "Blue square.", 'a (red), "left-handed" circle!']
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def words(**config):
    encoder = randomize(WordEncoder(WORDS, **{"width": 16, **config}))
    for name, parameter in encoder.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1.0
    return encoder


def plain(encoder, prompt):
    """One prompt in torch's own functions: (L, E)."""
    x = encoder.embedding(torch.tensor(encoder.split(prompt)))
    cos, sin = (t[:, None].to(x.dtype) for t in ops.rope_table((len(x),), (encoder.head_size,)))

    def norm(m, h):
        return F.layer_norm(h, h.shape[-1:], m.weight, m.bias, eps=1e-6)

    def rotate(u):
        a, b = u.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(u.dtype)

    for block in encoder.blocks:
        q, k, v = block.attn.qkv(norm(block.norm1, x)).unflatten(1, (3, block.attn.num_heads, -1)).unbind(1)
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        q, k, v = (u.transpose(0, 1)[None] for u in (rotate(q), rotate(k), v))
        x = x + block.attn.proj(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(norm(block.norm2, x)), approximate="tanh"))
    return norm(encoder.norm, x)


@each_dtype
def test_words_packed_equal_plain_pytorch_one_by_one(dtype):
    encoder = words().to(dtype)
    text = encoder(PROMPTS)
    wide = copy.deepcopy(encoder).double()
    truth, baseline = ([plain(e, p) for p in PROMPTS] for e in (wide, encoder))
    assert text.lengths == (6, 1, 3, 5) and text.max_seqlen == 6 and len(text) == 4
    assert text.cu_seqlens.tolist() == [0, 6, 7, 10, 15] and text.cu_seqlens.dtype == torch.int32
    close.assert_close(text.tokens, torch.cat(truth), torch.cat(baseline))
    close.assert_bitwise(text.pooled, torch.stack([words.mean(0) for words in text.tokens.split([6, 1, 3, 5])]))

    weights = torch.randn(text.tokens.shape).to(dtype)
    losses = [(text.tokens, encoder), (torch.cat(truth), wide), (torch.cat(baseline), encoder)]
    grads = []
    for tokens, module in losses:
        (tokens * weights).sum().backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
        module.zero_grad(set_to_none=True)
    scale = {name: grad.square().mean().sqrt() for name, grad in grads[1].items()}
    close.assert_close(*(torch.cat([(g[n] / scale[n]).flatten().to(g[n].dtype) for n in scale]) for g in grads))


def test_words_are_the_same_on_the_reference_backend():
    encoder = words()
    with fastdit.use_backend("reference"):
        baseline = encoder(PROMPTS)
    truth = copy.deepcopy(encoder).double()(PROMPTS)
    actual = encoder(PROMPTS)
    for part in ("tokens", "pooled"):
        close.assert_close(*(getattr(text, part) for text in (actual, truth, baseline)))


def test_case_and_punctuation_make_no_difference():
    encoder = words()
    assert encoder.split("A red, circle.") == encoder.split("a RED circle") == encoder.split(" a  red\ncircle!")
    assert encoder.split("a left-handed circle") != encoder.split("a circle")
    assert encoder.split("") == encoder.split(" ... ") != encoder.split("a")


def test_order_of_words_matters():
    encoder = words()
    one, other = encoder(["red circle", "circle red"]).pooled
    assert (one - other).abs().max() > 1e-3


def test_no_word_is_lost():
    """However sharp attention has become, each word of a prompt moves the vector: a start token that looked at two
    colours alone left motions and shapes without a gradient."""
    encoder = words()
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.weight *= 1000
    before = encoder(["a red circle"]).pooled
    for other in ("red red circle", "a circle circle", "a red red"):
        assert (encoder([other]).pooled - before).abs().max() > 1e-2


def test_null_prompt_is_learned():
    encoder = words()
    encoder([""]).pooled.sum().backward()
    moved = encoder.embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert moved == encoder.split("")


def test_training_reaches_every_parameter():
    encoder = words()
    encoder([*PROMPTS]).pooled.square().mean().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_vocabulary_does_not_depend_on_its_order():
    assert WordEncoder(WORDS, 8).index == WordEncoder(reversed(WORDS), 8).index
    encoder = WordEncoder([*WORDS, "red"], 8)
    assert sorted(encoder.index.values()) == list(range(2, 10)) and encoder.embedding.num_embeddings == 10


def test_concatenated_texts():
    encoder = words()
    both = Text.cat([encoder(PROMPTS[:2]), encoder(PROMPTS[2:])])
    whole = encoder(PROMPTS)
    assert both.lengths == whole.lengths and both.max_seqlen == whole.max_seqlen
    assert torch.equal(both.cu_seqlens, whole.cu_seqlens)
    close.assert_close(both.tokens, copy.deepcopy(encoder).double()(PROMPTS).tokens, whole.tokens)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: words()(["a purple circle"]), r"'purple', expected words of a, blue, circle, left-handed, moving"),
        (lambda: words()(["a rde circel"]), r"'rde' \(did you mean 'red'\?\), 'circel' \(did you mean 'circle'\?\)"),
        (lambda: words()("a circle"), "prompts must be a list; got 'a circle'"),
        (lambda: words()([]), r"prompts must be a list; got \[\]"),
        (lambda: WordEncoder([]), "empty vocabulary"),
        (lambda: WordEncoder(["red", "Blue"]), "got 'Blue'"),
        (lambda: WordEncoder(["light blue"]), "got 'light blue'"),
        (lambda: WordEncoder(WORDS, width=18, num_heads=6), "got width 18 for 6 heads, expected a multiple of 12"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# -- transformers -----------------------------------------------------------------------------------------
VOCABULARY = ["<pad>", "</s>", "<s>", "<unk>", "a", "red", "blue", "circle"]


def save_tokenizer(folder, template):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(token, ids[token]) for token in ("<s>", "</s>") if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_t5(folder):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1
    )
    randomize(T5EncoderModel(config)).save_pretrained(folder)
    save_tokenizer(folder, "$A </s>")
    return folder


def save_clip(folder):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    randomize(CLIPTextModel(config)).save_pretrained(folder)
    save_tokenizer(folder, "<s> $A </s>")
    return folder


SAVED = {"t5": save_t5, "clip": save_clip}
GIVEN = ["a red circle", "", "blue"]


@pytest.mark.parametrize("kind", SAVED)
def test_pretrained_encoders_pack_what_transformers_gives(kind, tmp_path):
    """Each prompt alone, without padding, through transformers' own classes."""
    encoder = PretrainedEncoder(SAVED[kind](tmp_path))
    text = encoder(GIVEN)

    def alone(encoder):
        tokens, pooled = [], []
        for prompt in GIVEN:
            out = encoder.model(**encoder.tokenizer(prompt, return_tensors="pt"))
            tokens.append(out.last_hidden_state[0])
            pooled.append(out.pooler_output[0] if kind == "clip" else out.last_hidden_state[0].mean(0))
        return torch.cat(tokens), torch.stack(pooled)

    baseline = alone(encoder)
    truth = alone(encoder.double())
    added = 2 if kind == "clip" else 1
    assert text.lengths == (3 + added, added, 1 + added) and encoder.width == 16
    close.assert_close(text.tokens, truth[0], baseline[0])
    close.assert_close(text.pooled, truth[1], baseline[1])
    assert encoder.float()(["red " * 90]).max_seqlen == (16 if kind == "clip" else 77)  # cut
    with pytest.raises(ValueError, match="PretrainedEncoder: prompts must be a list; got 'red'"):
        encoder("red")


@pytest.mark.parametrize("kind", SAVED)
def test_pretrained_encoders_are_no_part_of_the_checkpoint(kind, tmp_path):
    encoder = PretrainedEncoder(SAVED[kind](tmp_path))
    assert list(encoder.parameters()) == [] and encoder.state_dict() == {}
    assert not encoder.train().model.training
    assert encoder.to(torch.bfloat16)(GIVEN).tokens.dtype == torch.bfloat16
    text = encoder.float()(GIVEN)
    assert not text.tokens.requires_grad and not text.pooled.requires_grad
    model = VideoDiT(VideoDiTConfig(in_channels=4, hidden_size=48, depth=1, num_heads=2, text_size=encoder.width))
    x = torch.randn(3, 4, 1, 4, 4)
    randomize(model)
    assert (model(x, torch.ones(3), text) - model(x, torch.ones(3), encoder(["a"] * 3))).abs().max() > 1e-3


def test_a_folder_without_an_encoder(tmp_path):
    with pytest.raises(ValueError, match=r"no text encoder in .*; got no config\.json, expected model_type t5"):
        PretrainedEncoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="got model_type 'gpt2'"):
        PretrainedEncoder(tmp_path)
