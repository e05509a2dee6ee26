"""The tokenizer of a model as the front end has it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from realtime_serve.engine.load_spec import NULL_MODEL
from realtime_serve.machine import return_freed_memory


class FrontTokenizer(Protocol):
    """What the front end needs of a tokenizer."""

    @property
    def size(self) -> int:
        """One more than the largest token id."""

    def encode(self, text: str) -> list[int]: ...


def load_tokenizer(path: str) -> FrontTokenizer:
    if path == NULL_MODEL:
        from realtime_serve.runners.null import NullTokenizer

        return NullTokenizer()
    from realtime_serve.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(Path(path))
    return_freed_memory()
    return tokenizer
