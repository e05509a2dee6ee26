"""Drives a runner as the scheduler does: mixed batches over blocks that lie anywhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from realtime_serve.runners.arrays import Float32
from realtime_serve.runners.base import Runner, StepBatch

_UNDEFINED = 2**30


@dataclass(eq=False)
class DrivenSequence:
    """A sequence and what the model said of each of its positions so far."""

    tokens: list[int]
    row: int
    blocks: list[int] = field(default_factory=list)
    logits: list[Float32] = field(default_factory=list)
    """NaN where they were not wanted."""

    @property
    def remaining(self) -> int:
        return len(self.tokens) - len(self.logits)


class StepDriver:
    """Owns the blocks and the rows of the block table, both handed out in random order.

    Steps want logits of every token, or of this part of them."""

    def __init__(self, runner: Runner, *, max_batch_size: int, seed: int = 0, wanted: float = 1.0) -> None:
        self._runner = runner
        self._wanted = wanted
        self._random = random.Random(seed)
        self._free_blocks = self._random.sample(range(runner.num_blocks), runner.num_blocks)
        self._free_rows = self._random.sample(range(max_batch_size), max_batch_size)
        max_blocks = -(-runner.max_context // runner.block_size)
        self._block_table = np.full((max_batch_size, max_blocks), _UNDEFINED, np.int32)

    def add(self, tokens: Sequence[int]) -> DrivenSequence:
        return DrivenSequence(list(tokens), self._free_rows.pop())

    def free(self, sequence: DrivenSequence) -> None:
        """Its blocks and its row are the next to be handed out."""
        self._free_blocks += sequence.blocks
        self._free_rows.append(sequence.row)
        self._block_table[sequence.row] = _UNDEFINED

    def run(self, sequences: Sequence[DrivenSequence], *, max_chunk: int) -> None:
        """Steps of random subsets, with chunks of random sizes, until every token of every sequence is computed."""
        while waiting := [sequence for sequence in sequences if sequence.remaining]:
            chosen = self._random.sample(waiting, self._random.randint(1, len(waiting)))
            self.step([(s, self._random.randint(1, min(max_chunk, s.remaining))) for s in chosen])

    def step(self, work: Sequence[tuple[DrivenSequence, int]]) -> None:
        """Computes that many next tokens of each sequence, and keeps the logits that are wanted."""
        batch = self.batch(work)
        of_all = np.full((len(batch.tokens), len(self._runner.vocabulary_tokens)), np.nan, np.float32)

        def keep(logits: Float32) -> None:
            of_all[batch.logits_at] = logits

        batch.sample = keep
        self._runner.step(batch)
        first = 0
        for sequence, count in work:
            sequence.logits += list(of_all[first : first + count])
            first += count

    def batch(self, work: Sequence[tuple[DrivenSequence, int]]) -> StepBatch:
        """The step's arrays."""
        block_size = self._runner.block_size
        starts = [len(sequence.logits) for sequence, _ in work]
        ends = [start + count for start, (_, count) in zip(starts, work, strict=True)]
        for (sequence, _), end in zip(work, ends, strict=True):
            while len(sequence.blocks) * block_size < end:
                sequence.blocks.append(self._free_blocks.pop())
            self._block_table[sequence.row, : len(sequence.blocks)] = sequence.blocks
        spans = [(s, range(start, end)) for (s, _), start, end in zip(work, starts, ends, strict=True)]
        total = sum(len(span) for _, span in spans)
        wanted = [token for token in range(total) if self._random.random() < self._wanted]
        return StepBatch(
            tokens=np.array([s.tokens[p] for s, span in spans for p in span], np.int32),
            positions=np.array([p for _, span in spans for p in span], np.int32),
            kv_slots=np.array(
                [s.blocks[p // block_size] * block_size + p % block_size for s, span in spans for p in span], np.int64
            ),
            query_start=np.cumsum([0] + [len(span) for _, span in spans]).astype(np.int32),
            context_len=np.array(ends, np.int32),
            rows=np.array([s.row for s, _ in spans], np.int32),
            block_table=self._block_table,
            logits_at=np.array(wanted, np.int64),
            sampled=np.zeros(len(wanted), np.int32),
            logprobs=np.zeros(len(wanted), np.float32),
            sample=lambda logits: None,
        )
