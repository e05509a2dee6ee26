"""Byte-level vocabularies: how text is cut before merges apply, by the names that GGUF files have for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers


class PreTokenizer(NamedTuple):
    """How text is cut before merges apply."""

    build: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignore_merges: bool = False
    """A piece that is a token as it stands is taken so, whatever its merges would make of it."""
    add_bos: bool = False
    """Where the file does not say."""


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    """GPT-4's pattern, which its descendants vary in how many digits stay together."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_words(digits: str, ending: str) -> str:
    """GPT-4o's pattern: a word ends where a capital follows a small letter. `ending` may follow a word."""
    first, then = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{first}*{then}+{ending}|{before}{first}+{then}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


# GPT-2's pattern is built into the library.
_GPT2 = PreTokenizer(lambda: pre_tokenizers.ByteLevel(add_prefix_space=False))
_OLMO = _GPT2._replace(normalizer=normalizers.NFC)
_SMOLLM = PreTokenizer(
    lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
)
_GPT4 = PreTokenizer(lambda: _split(_words(r"\p{N}{1,3}")))
_LLAMA3 = _GPT4._replace(ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer(lambda: _split(_words(r"\p{N}")), normalizer=normalizers.NFC)
_GPT4O = PreTokenizer(lambda: _split(_cased_words(r"\p{N}{1,3}", ending=f"{_CONTRACTIONS}?")))
_TEKKEN = PreTokenizer(lambda: _split(_cased_words(r"\p{N}", ending="")), ignore_merges=True, add_bos=True)

# By `tokenizer.ggml.pre`. What each stands for is in the tokenizer.json of the models that it is named after, and in
# llama.cpp's src/llama-vocab.cpp, which chose the names (and has the rules for BOS).
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _OLMO,
    "smollm": _SMOLLM,
    "dbrx": _GPT4,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": _GPT4O,
    "tekken": _TEKKEN,
}


def build_byte_level(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer
) -> tokenizers.Tokenizer:
    """Raises whatever the library does where a merge's tokens are not in the vocabulary."""
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.ignore_merges))
    backend.pre_tokenizer = pre.build()
    if pre.normalizer is not None:
        backend.normalizer = pre.normalizer()
    return backend
