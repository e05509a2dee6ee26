"""A model that costs nothing: it measures everything but the model.

It emits one token a sequence a step, a word chosen by the token's position alone. `step_ms` paces its steps.
"""

from __future__ import annotations

import time

import numpy as np

from realtime_serve._core import NativeModel, NullModel
from realtime_serve.runners.arrays import Int32
from realtime_serve.runners.base import StepBatch

_TEXT = (
    " the of and to in is that it was for on are as with his they be at one have this from or had by hot but some what"
    " there we can out other were all your when up use word how said an each she which do their time if will way about"
    " many then them would write like so these her long make thing see him two has look more day could go come did my"
    " sound no most number who over know water than call first people may down side been now find any new work part"
)
_WORDS = _TEXT.split()
_FIRST_WORD = 256
_EOS = _FIRST_WORD + len(_WORDS)
_LONGEST_STEP_NS = 2**61  # 73 years: what it is due at still fits in 64 bits


class NullTokenizer:
    """Text is its UTF-8 bytes: token ids 0 to 255. The words that the model emits and its end token follow."""

    size = _EOS + 1
    special_tokens = frozenset((_EOS,))
    eos_tokens = frozenset((_EOS,))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def vocabulary_tokens(self) -> list[bytes]:
        return [bytes((byte,)) for byte in range(256)] + [b" " + word.encode() for word in _WORDS] + [b""]


class NullRunner:
    """See `NativeRunner` for the contract. `step` is the same model, for who drives it in Python."""

    block_size = 64

    def __init__(self, *, max_context: int, max_batch_size: int, step_ms: float = 0.0) -> None:
        tokenizer = NullTokenizer()
        self.vocabulary_tokens = tokenizer.vocabulary_tokens()
        self.special_tokens = tokenizer.special_tokens
        self.eos_tokens = tokenizer.eos_tokens
        self.max_context = max_context
        self.weights = ""
        self.num_blocks = max_batch_size * -(-max_context // self.block_size)
        self._native_model = NullModel(
            first_token=_FIRST_WORD, tokens=len(_WORDS), step_ns=min(round(step_ms * 1e6), _LONGEST_STEP_NS)
        )
        self._step_s = step_ms / 1e3
        self._step_due = 0.0
        # One entry a position, so that a step is one gather.
        self._token_at: Int32 = (_FIRST_WORD + np.arange(max_context, dtype=np.int32) % len(_WORDS)).astype(np.int32)

    @property
    def native_model(self) -> NativeModel | None:
        return self._native_model

    def step(self, batch: StepBatch) -> None:
        if self._step_s:
            self._wait_for_step()
        np.take(self._token_at, batch.positions[batch.logits_at], out=batch.sampled)
        batch.logprobs.fill(0.0)

    def _wait_for_step(self) -> None:
        """Sleeps until the step is due: steps keep the pace on average, and an idle time is not caught up with."""
        now = time.monotonic()
        self._step_due = max(self._step_due + self._step_s, now)
        time.sleep(self._step_due - now)

    def close(self) -> None:
        """Holds nothing."""
