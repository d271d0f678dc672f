"""Text for a video model: a small encoder of a closed vocabulary, or transformers' T5 and CLIP from a local folder.

An encoder is a callable: list of S prompts -> `Text`. The prompt "" is the null prompt of classifier-free guidance.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.nn import DiTBlock
from fastdit.packing import packed

WORD = re.compile(r"[^\s.,;:!?\"()]+")
PRETRAINED = {
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}  # by model_type
START, NULL = 0, 1  # the first tokens of the vocabulary: before the words of a prompt, and in place of no words


@dataclass(frozen=True, eq=False)
class Text:
    """S encoded prompts, packed.

    tokens (M, E); cu_seqlens (S + 1,) int32: where prompts begin; max_seqlen: the longest; pooled (S, E): one vector of
    each prompt; lengths: tokens of each prompt, as ints.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    pooled: Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def pack(tokens: Tensor, pooled: Tensor, lengths: Sequence[int]) -> Text:
        """The prompts with these lengths around tokens (M, E) that are packed already."""
        layout = packed(tokens, [(1, 1, n) for n in lengths])
        return Text(tokens, layout.cu_seqlens, layout.max_seqlen, pooled, tuple(lengths))

    @staticmethod
    def cat(texts: Sequence[Text]) -> Text:
        """Prompts after prompts: with and without the condition, for guidance in one batch."""
        tokens, pooled = (torch.cat([getattr(t, part) for t in texts]) for part in ("tokens", "pooled"))
        return Text.pack(tokens, pooled, [n for t in texts for n in t.lengths])


def check_prompts(name: str, prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(
            f"{name}: prompts must be a list; got {prompts!r}, expected e.g. ['a red circle']; put it into one."
        )


class WordEncoder(nn.Module):
    """A transformer over the words of a closed vocabulary, to be trained with the model it serves.

        tokens = norm(blocks(embedding([start, word, ...]))),   pooled = their mean;   "" is [null]

    Queries and keys are normalised: without it the attention of a few words grew until the others had no gradient.

    Args:
        words (iterable of str): the vocabulary, in any order, without upper case and punctuation. width (int): E.
        depth, num_heads (int): of the transformer, which rotates queries and keys by the place of a word.
    Shapes: list of S prompts -> Text of (M, width). Case and punctuation of a prompt make no difference.
    Raises: ValueError: unknown words, named with the known ones.
    """

    def __init__(self, words: Iterable[str], width: int = 128, depth: int = 2, num_heads: int = 2):
        super().__init__()
        self.words = tuple(sorted(set(words)))
        if not self.words:
            raise ValueError("WordEncoder: no words; got an empty vocabulary, expected at least one; pass the words.")
        wrong = [w for w in self.words if WORD.fullmatch(w) is None or w != w.lower()]
        if wrong:
            raise ValueError(
                f"WordEncoder: the vocabulary holds what no prompt is split into; got {wrong[0]!r}, expected words in "
                "lower case without spaces and punctuation; split it."
            )
        if width % num_heads or width // num_heads % 2:
            raise ValueError(
                f"WordEncoder: heads must have an even width; got width {width} for {num_heads} heads, "
                f"expected a multiple of {2 * num_heads}; change one of them."
            )
        self.width, self.head_size = width, width // num_heads
        self.index = {word: i for i, word in enumerate(self.words, NULL + 1)}
        self.embedding = nn.Embedding(len(self.words) + NULL + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, conditioning=None, qk_norm="rms") for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def split(self, prompt: str) -> list[int]:
        """The tokens of a prompt: start and one for each word, or the null token alone."""
        found = WORD.findall(prompt.lower())
        unknown = [word for word in dict.fromkeys(found) if word not in self.index]
        if unknown:
            near = {w: difflib.get_close_matches(w, self.words, 1) for w in unknown}
            meant = ", ".join(f"{w!r}{f' (did you mean {n[0]!r}?)' if n else ''}" for w, n in near.items())
            raise ValueError(
                f"WordEncoder: unknown words in {prompt!r}; got {meant}, expected words of {', '.join(self.words)}; "
                "say it with these."
            )
        return [START, *(self.index[word] for word in found)] if found else [NULL]

    def forward(self, prompts: Sequence[str]) -> Text:
        check_prompts("WordEncoder", prompts)
        rows = [self.split(prompt) for prompt in prompts]
        device = self.embedding.weight.device
        x = self.embedding(torch.tensor([i for row in rows for i in row], device=device))
        text = Text.pack(x, x, [len(row) for row in rows])
        cos, sin = ops.rope_table([(n,) for n in text.lengths], (self.head_size,), device=device)
        for block in self.blocks:
            x = block(x, cos=cos, sin=sin, cu_seqlens=text.cu_seqlens, max_seqlen=text.max_seqlen)
        x = ops.norm_modulate(x, weight=self.norm.weight, bias=self.norm.bias, eps=self.norm.eps)
        pooled = torch.stack([words.mean(0) for words in x.split(text.lengths)])
        return Text(x, text.cu_seqlens, text.max_seqlen, pooled, text.lengths)


class PretrainedEncoder(nn.Module):
    """The text encoder of a transformers T5 or CLIP, with its tokenizer, from a local folder; it stays as it is.

        tokens = last hidden states;   pooled = their mean (T5), or the pooled output (CLIP)

    Its weights are no parameters of this module and do not enter its state dict: the folder holds them.

    Args:
        path: folder that `save_pretrained` of model and tokenizer wrote. max_length (int): tokens of a
            prompt at most, less where the model has fewer positions; longer ones are cut.
    Shapes: list of S prompts -> Text of (M, width).
    Raises: ValueError: no such model in the folder.
    """

    model: Any

    def __init__(self, path: str | Path, max_length: int = 77):
        super().__init__()
        import transformers

        config = Path(path) / "config.json"
        kind = json.loads(config.read_text("utf-8")).get("model_type") if config.is_file() else None
        if kind not in PRETRAINED:
            found = f"model_type {kind!r}" if config.is_file() else "no config.json"
            raise ValueError(
                f"PretrainedEncoder: no text encoder in {str(path)!r}; got {found}, expected model_type "
                f"{', '.join(PRETRAINED)}; pass the folder with the model and its tokenizer."
            )
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = getattr(transformers, PRETRAINED[kind]).from_pretrained(path, local_files_only=True)
        object.__setattr__(self, "model", model.requires_grad_(False).eval())  # not a submodule
        self.width: int = model.config.hidden_size
        self.max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))

    def _apply(self, fn, recurse: bool = True):
        self.model._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Text:
        check_prompts("PretrainedEncoder", prompts)
        given = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        ids, mask = given["input_ids"].to(self.model.device), given["attention_mask"].to(self.model.device)
        out = self.model(input_ids=ids, attention_mask=mask)
        tokens, lengths = out.last_hidden_state, given["attention_mask"].sum(1)
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return Text.pack(tokens[mask.bool()], pooled.to(tokens.dtype), lengths.tolist())
