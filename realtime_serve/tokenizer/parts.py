"""What a model's files say of its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from realtime_serve.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    import tokenizers


class Encoder(NamedTuple):
    """What makes tokens of text."""

    backend: tokenizers.Tokenizer
    prefix: tuple[int, ...] = ()
    """Goes before every text, in addition to what the backend puts there."""
    suffix: tuple[int, ...] = ()
    """Goes behind every text."""


class TokenizerParts(NamedTuple):
    vocabulary: Vocabulary
    special: frozenset[int]
    """They print as nothing."""
    eos: frozenset[int]
    make_encoder: Callable[[], Encoder]
    """Takes far longer than the rest, and the import of the tokenizers library; a worker never encodes."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
