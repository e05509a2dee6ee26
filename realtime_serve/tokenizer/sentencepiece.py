"""SentencePiece vocabularies: pieces with scores, and bytes where a character has no piece."""

from __future__ import annotations

from collections.abc import Mapping

import tokenizers
from tokenizers import models, normalizers

from realtime_serve.tokenizer.vocabulary import SPACE


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Two neighbours are joined where that makes a piece, the best-scored piece first: byte pair encoding takes the
    same from the order of its merges.

    Of pieces with equal scores the one that comes first in `scores` is made first; of the ways to make one, the
    longest left part first, as in the tokenizer.json of converted models.
    """
    ranked = [
        (-score, piece, cut)
        for piece, score in scores.items()
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    ranked.sort(key=lambda merge: merge[0])  # stable: equal scores stay in order
    return [(piece[:cut], piece[cut:]) for _, piece, cut in ranked]


def build_sentencepiece(
    vocabulary: dict[str, int], scores: Mapping[str, float], *, space_before: bool
) -> tokenizers.Tokenizer:
    """`vocabulary` has the 256 bytes as "<0x0A>", `scores` the pieces that text is made into, in the order of their
    ids. `space_before`: a space goes before each part of a text between named tokens, as SentencePiece does with a
    whole text.
    """
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges_of(scores), byte_fallback=True))
    escaped = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escaped]) if space_before else escaped
    return backend
