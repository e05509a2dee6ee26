"""What a runner needs of a tokenizer."""

from __future__ import annotations

from typing import Protocol

from realtime_serve.errors import ModelLoadError


class VocabularySource(Protocol):
    """A tokenizer, as a runner sees it."""

    @property
    def special_tokens(self) -> frozenset[int]: ...

    @property
    def eos_tokens(self) -> frozenset[int]: ...

    def vocabulary_tokens(self) -> list[bytes]: ...


def padded_vocabulary(tokenizer: VocabularySource, logits: int) -> list[bytes]:
    """The tokenizer's tokens; embeddings are often padded to a round number of rows, which print as nothing.

    Raises ModelLoadError where the model has fewer logits than there are tokens.
    """
    tokens = tokenizer.vocabulary_tokens()
    if len(tokens) > logits:
        raise ModelLoadError(f"the tokenizer has {len(tokens)} tokens, the model {logits}")
    return tokens + [b""] * (logits - len(tokens))
