"""The tokenizer of a model, and the half of it that a worker needs."""

from __future__ import annotations

from pathlib import Path

from realtime_serve.tokenizer.folder import read_folder
from realtime_serve.tokenizer.gguf import read_gguf
from realtime_serve.tokenizer.parts import TokenizerParts


class TokenVocabulary:
    """What a model's tokens print as. Immutable; any thread may call it."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts

    @classmethod
    def load(cls, path: Path) -> TokenVocabulary:
        """Of a GGUF file or a Hugging Face folder.

        Raises UnsupportedModelError or ModelLoadError in one line that names the file and what is wrong.
        """
        return cls(_read(path))

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return len(self._parts.vocabulary.entries)

    @property
    def special_tokens(self) -> frozenset[int]:
        return self._parts.special

    @property
    def eos_tokens(self) -> frozenset[int]:
        return self._parts.eos

    def vocabulary_tokens(self) -> list[bytes]:
        """What each token prints as, by id; nothing for special tokens and for ids that are not used.

        A leading space stays. The decoders of SentencePiece models take one away, at the start of a whole text, where
        encoding has put one; what is printed here follows a prompt, and its first space is the one between the two.
        """
        return self._parts.vocabulary.printed(self._parts.special)


class Tokenizer(TokenVocabulary):
    """The same, and what makes tokens of text."""

    def __init__(self, parts: TokenizerParts) -> None:
        super().__init__(parts)
        self._backend, self._prefix, self._suffix = parts.make_encoder()

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """See TokenVocabulary.load."""
        return cls(_read(path))

    def encode(self, text: str) -> list[int]:
        """As the model's own tokenizer does it: a special token's name in the text becomes that token, and bytes that
        the vocabulary lacks are left out.
        """
        return [*self._prefix, *self._backend.encode(text).ids, *self._suffix]


def _read(path: Path) -> TokenizerParts:
    return read_folder(path) if path.is_dir() else read_gguf(path)
