"""A step's batch as attention computes it: which tokens go together, where their contexts lie, and what is hidden."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from realtime_serve.runners.base import StepBatch
from realtime_serve.runners.torch_lm.kv_cache import KvCache

# Decoding sequences share a kernel call while the shorter's padding is under this many positions or this share of its
# context. A call costs what 300 positions do (50 us and 0.17 us, float32, SmolLM2-135M, two Zen 3 cores).
_PADDING_POSITIONS = 64
_PADDING_SHARE = 0.25

_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """G sequences with Q tokens each in this step, G or Q being 1; their contexts are padded to L positions."""

    tokens: torch.Tensor  # [G * Q] where its tokens are in the flat batch
    slots: torch.Tensor  # [G * L] where its context is in the cache
    mask: torch.Tensor  # [G, 1, Q, L] added to the scores


class AttentionStep:
    """What attention needs to know of a step. Segments are built once for all layers with the same window."""

    def __init__(self, batch: StepBatch, cache: KvCache) -> None:
        self._block_size = cache.block_size
        self._dtype, self._device = cache.dtype, cache.device
        self.kv_slots = torch.from_numpy(batch.kv_slots).to(cache.device)
        self._batch = batch
        self._queries = np.diff(batch.query_start).astype(np.int64)
        self._context = batch.context_len.astype(np.int64)
        self._longest = int(self._context.max())
        self._segments: dict[int | None, list[Segment]] = {}

    def segments(self, window: int | None) -> list[Segment]:
        """Every token is in one of them. With a window, each sees as many positions, its own being the last."""
        if window is not None and window >= self._longest:
            window = None
        if window not in self._segments:
            first = np.zeros_like(self._context)
            if window is not None:
                first = np.maximum(self._context - self._queries - window + 1, 0)
            decoding = np.flatnonzero(self._queries == 1)
            self._segments[window] = [
                *self._decoding_segments(decoding, first[decoding] // self._block_size, window),
                *(
                    self._chunk_segment(chunk, int(first[chunk]), window)
                    for chunk in np.flatnonzero(self._queries > 1).tolist()
                ),
            ]
        return self._segments[window]

    def _decoding_segments(self, members: _Indices, first_block: _Indices, window: int | None) -> Iterator[Segment]:
        """Of the sequences with one token, those whose contexts are about as long share a segment.

        All are laid out in one array a block a row, [B, block_size], of which each segment is a slice.
        """
        if not len(members):
            return
        block_size = self._block_size
        num_blocks = (self._context[members] - 1) // block_size + 1 - first_block
        order = np.argsort(num_blocks, kind="stable")
        members, first_block, num_blocks = members[order], first_block[order], num_blocks[order]
        ends = list(_group_ends(num_blocks * block_size))
        sizes = np.diff([0, *ends])

        widths = np.repeat(num_blocks[np.array(ends) - 1], sizes)
        starts = np.cumsum(widths) - widths
        sequence = np.repeat(np.arange(len(members)), widths)
        block = np.arange(len(sequence)) + (first_block - starts)[sequence]
        last = (self._context[members] - 1)[sequence]
        own_block = np.minimum(block, last // block_size)
        physical = self._batch.block_table[self._batch.rows[members[sequence]], own_block].astype(np.int64)
        offset = np.arange(block_size)
        slots = (physical * block_size)[:, None] + offset
        mask = np.zeros(slots.shape, np.float32)
        # Only at a context's ends is there anything to hide.
        is_end = block >= last // block_size
        if window is not None:
            is_end |= block * block_size <= last - window
        ends_at = np.flatnonzero(is_end)
        position, last = (block[ends_at] * block_size)[:, None] + offset, last[ends_at, None]
        # Padding repeats the sequence's own last position: masked or not, another sequence's NaN must not get in.
        slots[ends_at] = np.minimum(position, last) + ((physical - own_block)[ends_at] * block_size)[:, None]
        mask[ends_at] = np.where(_hidden(position, last, window), -np.inf, 0)

        all_tokens = torch.from_numpy(self._batch.query_start[members].astype(np.int64)).to(self._device)
        all_slots = torch.from_numpy(slots.ravel()).to(self._device)
        all_masks = torch.from_numpy(mask.ravel()).to(self._device, self._dtype)
        begin = 0
        for size, end in zip(sizes.tolist(), ends, strict=True):
            positions = size * int(widths[end - 1]) * block_size
            yield Segment(
                tokens=all_tokens[end - size : end],
                slots=all_slots[begin : begin + positions],
                mask=all_masks[begin : begin + positions].view(size, 1, 1, -1),
            )
            begin += positions

    def _chunk_segment(self, sequence: int, first: int, window: int | None) -> Segment:
        """A sequence with several tokens is a segment of its own."""
        block_size = self._block_size
        queries, context = int(self._queries[sequence]), int(self._context[sequence])
        block = np.arange(first // block_size, (context - 1) // block_size + 1)
        physical = self._batch.block_table[self._batch.rows[sequence], block].astype(np.int64)
        position = (block[:, None] * block_size + np.arange(block_size)).ravel()[: context - block[0] * block_size]
        slots = position + np.repeat((physical - block) * block_size, block_size)[: len(position)]
        query_position = np.arange(context - queries, context)[:, None]
        start = int(self._batch.query_start[sequence])
        hidden = torch.from_numpy(_hidden(position, query_position, window)).to(self._device)
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, -torch.inf)
        return Segment(
            tokens=torch.arange(start, start + queries, device=self._device),
            slots=torch.from_numpy(slots).to(self._device),
            mask=mask[None, None],
        )


def _hidden(position: _Indices, query_position: _Indices, window: int | None) -> npt.NDArray[np.bool_]:
    """Where a query does not see a position: what comes later, and what has left its window."""
    hidden = position > query_position
    return hidden if window is None else hidden | (position <= query_position - window)


def _group_ends(lengths: _Indices) -> Iterator[int]:
    """Where each run of about equal lengths ends, of lengths in ascending order."""
    end = 0
    while end < len(lengths):
        shortest = int(lengths[end])
        longest = shortest + max(_PADDING_POSITIONS, int(shortest * _PADDING_SHARE))
        end = int(np.searchsorted(lengths, longest, side="right"))
        yield end
