"""What the worker hands to a model runner, and what it expects back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from realtime_serve._core import NativeModel

if TYPE_CHECKING:  # numpy is 60 ms and 9 MB that a front end does without
    from realtime_serve.runners.arrays import Float32, Int32, Int64


@dataclass(slots=True)
class StepBatch:
    """One step's flat batch: views into buffers that the worker reuses, valid until `step` returns.

    T tokens of R sequences, of which S want logits. Sequence r's tokens of this step are
    ``tokens[query_start[r]:query_start[r + 1]]``; after the step its context is ``context_len[r]`` positions long, and
    position p of it lies in the KV cache at ``block_table[rows[r], p // block_size] * block_size + p % block_size``.
    """

    tokens: Int32  # [T]
    positions: Int32  # [T]
    kv_slots: Int64  # [T] where each token's key and value go in the flattened [num_blocks * block_size] cache
    query_start: Int32  # [R + 1]
    context_len: Int32  # [R]
    rows: Int32  # [R] each sequence's row of block_table
    block_table: Int32  # [max_batch_size, max_blocks]; entries past a sequence's last block are undefined
    logits_at: Int64  # [S] indices into the T tokens, ascending
    sampled: Int32  # [S] out: the token sampled for each of logits_at; -1: its logits were not finite
    logprobs: Float32  # [S] out: its log-probability before temperature; written where a row asks for it
    sample: Callable[[Float32], None]
    """Samples from logits, float32, C-contiguous, [S, vocabulary], into `sampled` and `logprobs` (C++, no GIL)."""


class Runner(Protocol):
    """A loaded batched token model. `step` is called from one thread at a time."""

    @property
    def vocabulary_tokens(self) -> list[bytes]:
        """What each token id prints as; empty for control tokens. Its length is the number of logits."""

    @property
    def special_tokens(self) -> frozenset[int]:
        """Control tokens: they have no text."""

    @property
    def eos_tokens(self) -> frozenset[int]:
        """Tokens that end a sequence."""

    @property
    def max_context(self) -> int:
        """Positions that one sequence can have, prompt included."""

    @property
    def weights(self) -> str:
        """As what its weights are computed with, for a person: "float32", "8-bit"; empty where it has none."""

    @property
    def block_size(self) -> int:
        """Positions in a KV block."""

    @property
    def num_blocks(self) -> int:
        """KV blocks that there are."""

    def step(self, batch: StepBatch) -> None:
        """Runs the model over the batch and fills `batch.sampled`, by `batch.sample` or by itself."""

    def close(self) -> None:
        """Frees what it holds; called once, after the last step."""


class CachingRunner(Runner, Protocol):
    """A runner whose KV blocks keep what they hold: a sequence then starts behind the prefix that others have computed,
    and a row's context may lie in blocks that another row of an earlier step has filled."""

    @property
    def cached_blocks(self) -> int:
        """Blocks that are kept for their prefixes while no sequence uses them; 0: none."""


class NativeRunner(Runner, Protocol):
    """A runner whose model is C++ as well: the engine then runs its steps without Python and the GIL, and never calls
    `step`."""

    @property
    def native_model(self) -> NativeModel | None:
        """Does what `step` does, for the life of the runner. None: `step` is called."""
