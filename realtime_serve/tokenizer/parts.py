"""What a model's files say of its tokenizer."""

from __future__ import annotations

from typing import NamedTuple

import tokenizers

from realtime_serve.tokenizer.vocabulary import Vocabulary


class TokenizerParts(NamedTuple):
    backend: tokenizers.Tokenizer
    vocabulary: Vocabulary
    special: frozenset[int]
    """They print as nothing."""
    eos: frozenset[int]
    prefix: tuple[int, ...] = ()
    """Goes before every text, in addition to what the backend puts there."""
    suffix: tuple[int, ...] = ()
    """Goes behind every text."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
