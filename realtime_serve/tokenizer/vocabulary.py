"""What tokens print as: each way in which vocabularies spell bytes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Protocol

from realtime_serve._core import decode_byte_level
from realtime_serve.errors import ModelLoadError

SPACE = "▁"
"""Stands for a space in the entries of SentencePiece models."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of(entry: str) -> int | None:
    """The byte that a fallback entry such as "<0x0A>" stands for."""
    match = _BYTE.fullmatch(entry)
    return None if match is None else int(match[1], 16)


class Vocabulary(Protocol):
    """A model's tokens as its files spell them, by id; empty where an id is not used."""

    entries: list[str]

    def printed(self, special: Collection[int]) -> list[bytes]:
        """What each prints as, by id; nothing for the ids in `special`. Raises ModelLoadError."""


class ByteLevelVocabulary:
    """Every token is a run of bytes, each spelled as a printable character, but for those in `verbatim`: plain text."""

    def __init__(self, entries: list[str], *, source: str, verbatim: Iterable[int]) -> None:
        self.entries = entries
        self._source = source
        self._verbatim = frozenset(verbatim)

    def printed(self, special: Collection[int]) -> list[bytes]:
        spelled = self.entries.copy()
        for token in self._verbatim.union(special):
            spelled[token] = ""
        try:
            printed: list[bytes] = decode_byte_level(spelled)
        except ValueError as error:
            raise ModelLoadError(f"{self._source}: {error}") from None
        for token in self._verbatim.difference(special):
            printed[token] = self.entries[token].encode()
        return printed


class SentencePieceVocabulary:
    """Every token is text with `space` for each space, but for those in `fallback`: "<0x0A>" for a byte."""

    def __init__(self, entries: list[str], *, fallback: Iterable[int], space: str = SPACE) -> None:
        self.entries = entries
        self._fallback = frozenset(fallback)
        self._space = space

    def printed(self, special: Collection[int]) -> list[bytes]:
        printed = [entry.replace(self._space, " ").encode("utf-8", "surrogateescape") for entry in self.entries]
        for token in self._fallback:
            byte = byte_of(self.entries[token])
            assert byte is not None
            printed[token] = bytes([byte])
        for token in special:
            printed[token] = b""
        return printed
