"""Attention over the paged KV cache, as an attention function of transformers' models.

A step's tokens come as one flat batch, [1, T]; which sequence and position each belongs to is in an `AttentionStep`,
which reaches the function as a keyword argument of the model's forward. No mask function is registered beside it:
transformers then builds no mask, and the model's own is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import AttentionInterface

from realtime_serve.runners.base import StepBatch
from realtime_serve.runners.torch_lm.kv_cache import KvCache

ATTENTION = "realtime_serve_paged"

# Decoding sequences share a kernel call while the shorter's padding is under this many positions or this share of its
# context. A call costs what 300 positions do (50 us and 0.17 us, float32, SmolLM2-135M, two Zen 3 cores).
_PADDING_POSITIONS = 64
_PADDING_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Segment:
    """G sequences with Q tokens each in this step; their contexts are padded to L positions."""

    tokens: torch.Tensor  # [G * Q] where its tokens are in the flat batch
    slots: torch.Tensor  # [G * L] where its context is in the cache
    mask: torch.Tensor  # [G, 1, heads per KV head * Q, L] added to the scores
    sequences: int


class AttentionStep:
    """What attention needs to know of a step; built once, used by every layer."""

    def __init__(
        self, batch: StepBatch, cache: KvCache, *, heads_per_kv_head: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.cache = cache
        self.kv_slots = torch.from_numpy(batch.kv_slots).to(device)
        self.segments = [
            self._segment(batch, members, heads_per_kv_head, dtype, device)
            for members in _group(np.diff(batch.query_start), batch.context_len)
        ]

    def _segment(
        self,
        batch: StepBatch,
        members: npt.NDArray[np.intp],
        heads_per_kv_head: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Segment:
        starts = batch.query_start[members]
        queries = int(batch.query_start[members[0] + 1] - starts[0])
        context = batch.context_len[members, None]
        position = np.arange(context.max())
        # Padding repeats the sequence's own last position: masked or not, another sequence's NaN must not get in.
        own = np.minimum(position, context - 1)
        block = batch.block_table[batch.rows[members, None], own // self.cache.block_size].astype(np.int64)
        slots = block * self.cache.block_size + own % self.cache.block_size
        query_position = context - queries + np.arange(queries)
        hidden = torch.from_numpy(position > query_position[:, :, None]).to(device)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        return Segment(
            tokens=torch.from_numpy((starts[:, None] + np.arange(queries)).ravel()).to(device),
            slots=torch.from_numpy(slots.ravel()).to(device),
            mask=mask.repeat(1, heads_per_kv_head, 1)[:, None],
            sequences=len(members),
        )


def _group(queries: npt.NDArray[np.int32], context: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.intp]]:
    """Sequences to compute together: those with one token by similar context, each other one alone."""
    decoding = np.flatnonzero(queries == 1)
    decoding = decoding[np.argsort(context[decoding], kind="stable")]
    while len(decoding):
        shortest = int(context[decoding[0]])
        longest = shortest + max(_PADDING_POSITIONS, int(shortest * _PADDING_SHARE))
        size = int(np.searchsorted(context[decoding], longest, side="right"))
        yield decoding[:size]
        decoding = decoding[size:]
    for sequence in np.flatnonzero(queries > 1):
        yield np.array([sequence])


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_step: AttentionStep,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Stores the step's keys and values, then attends each sequence's queries to its whole context.

    query is [1, heads, T, head_dim], key and value are [1, kv_heads, T, head_dim]; what comes back is [1, T, heads,
    head_dim].
    """
    cache, layer = attention_step.cache, cast(int, module.layer_idx)
    cache.write(layer, attention_step.kv_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    query = query[0].transpose(0, 1)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for segment in attention_step.segments:
        keys, values = cache.gather(layer, segment.slots)
        attended = _attend(query.index_select(0, segment.tokens), keys, values, segment, scaling)
        output.index_copy_(0, segment.tokens, attended)
    return output[None], None


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, segment: Segment, scaling: float
) -> torch.Tensor:
    """[G * Q, heads, head_dim] queries against [G * L, kv_heads, head_dim] keys and values.

    The query heads of a KV head become rows of one matrix: scaled_dot_product_attention's own enable_gqa takes six
    times as long for one bfloat16 query, and leaves CUDA's fused kernels where there is a mask.
    """
    groups, (_, heads, head_dim), kv_heads = segment.sequences, query.shape, keys.shape[1]
    packed = query.view(groups, -1, kv_heads, heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
    attended = scaled_dot_product_attention(
        packed.reshape(groups, kv_heads, -1, head_dim),
        keys.view(groups, -1, kv_heads, head_dim).transpose(1, 2),
        values.view(groups, -1, kv_heads, head_dim).transpose(1, 2),
        attn_mask=segment.mask,
        scale=scaling,
    )
    unpacked = attended.reshape(groups, kv_heads, heads // kv_heads, -1, head_dim).permute(0, 3, 1, 2, 4)
    return unpacked.reshape(query.shape)


AttentionInterface.register(ATTENTION, paged_attention)
