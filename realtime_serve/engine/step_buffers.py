"""The arrays of a step: allocated once, filled by the core, read by the runner."""

from __future__ import annotations

import numpy as np

from realtime_serve._core import EngineCore
from realtime_serve.runners.base import StepBatch


class StepBuffers:
    """Caller-owned memory of the batch assembler, for `max_tokens` tokens of `max_rows` sequences."""

    def __init__(self, core: EngineCore, *, max_tokens: int, max_rows: int, max_blocks: int) -> None:
        self._core = core
        self.tokens = np.zeros(max_tokens, np.int32)
        self.positions = np.zeros(max_tokens, np.int32)
        self.kv_slots = np.zeros(max_tokens, np.int64)
        self.query_start = np.zeros(max_rows + 1, np.int32)
        self.context_len = np.zeros(max_rows, np.int32)
        self.rows = np.zeros(max_rows, np.int32)
        self.block_table = np.zeros((max_rows, max_blocks), np.int32)
        self.logits_at = np.zeros(max_rows, np.int64)
        self.sampled = np.zeros(max_rows, np.int32)
        self.logprobs = np.zeros(max_rows, np.float32)
        core.bind_buffers(
            tokens=self.tokens,
            positions=self.positions,
            kv_slots=self.kv_slots,
            query_start=self.query_start,
            context_len=self.context_len,
            rows=self.rows,
            block_table=self.block_table,
            logits_at=self.logits_at,
            sampled=self.sampled,
            logprobs=self.logprobs,
        )

    def batch(self, tokens: int, sequences: int, samples: int) -> StepBatch:
        """Views of what the core has just assembled."""
        return StepBatch(
            tokens=self.tokens[:tokens],
            positions=self.positions[:tokens],
            kv_slots=self.kv_slots[:tokens],
            query_start=self.query_start[: sequences + 1],
            context_len=self.context_len[:sequences],
            rows=self.rows[:sequences],
            block_table=self.block_table,
            logits_at=self.logits_at[:samples],
            sampled=self.sampled[:samples],
            logprobs=self.logprobs[:samples],
            sample=self._core.sample,
        )
