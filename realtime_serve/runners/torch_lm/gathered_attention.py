"""Paged attention with torch's own operations, on any device and in any type."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from realtime_serve.runners.base import StepBatch
from realtime_serve.runners.torch_lm.attention_step import AttentionStep
from realtime_serve.runners.torch_lm.kv_cache import KvCache


class GatheredAttention:
    """See `PagedAttention`. Contexts are gathered out of the blocks, those of about the same length together."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache

    def begin_step(self, batch: StepBatch) -> None:
        self._step = AttentionStep(batch, self._cache)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        self._cache.write(layer, self._step.kv_slots, key, value)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for segment in self._step.segments(window):
            keys, values = self._cache.gather(layer, segment.slots)
            attended = _attend(query.index_select(0, segment.tokens), keys, values, segment.mask, scale, softcap)
            output.index_copy_(0, segment.tokens, attended)
        return output


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """[G * Q, heads, head_dim] queries against [G * L, kv_heads, head_dim] keys and values.

    Query heads that share a KV head become rows of one matrix where there is one query, and else a batch of their own:
    scaled_dot_product_attention's own enable_gqa takes six times as long for one bfloat16 query, and leaves CUDA's
    fused kernels where there is a mask.
    """
    groups, _, queries, length = mask.shape
    heads, head_dim, kv_heads = query.shape[1], query.shape[2], keys.shape[1]
    shared = heads // kv_heads
    if queries == 1:
        packed = query.view(groups, kv_heads, shared, head_dim)
        keys = keys.view(groups, length, kv_heads, head_dim).transpose(1, 2)
        values = values.view(groups, length, kv_heads, head_dim).transpose(1, 2)
        return _score(packed, keys, values, mask, scale, softcap).reshape(query.shape)
    packed = query.view(queries, kv_heads, shared, head_dim).permute(1, 2, 0, 3)
    keys = keys.transpose(0, 1)[:, None].expand(-1, shared, -1, -1)
    values = values.transpose(0, 1)[:, None].expand(-1, shared, -1, -1)
    return _score(packed, keys, values, mask, scale, softcap).permute(2, 0, 1, 3).reshape(query.shape)


def _score(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    # scaled_dot_product_attention has no place for what comes between the scores and the mask.
    scores = torch.matmul(query, keys.transpose(-1, -2)).mul_(scale / softcap).tanh_().mul_(softcap).add_(mask)
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype), values)
