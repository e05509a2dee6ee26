"""Attention over the paged KV cache, as an attention function of transformers' models.

A step's tokens come as one flat batch, [1, T]; which sequence and position each belongs to is in an `AttentionStep`,
which reaches the function as a keyword argument of the model's forward. No mask function is registered beside it:
transformers then builds no mask, and the model's own is here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import AttentionInterface

from realtime_serve.runners.torch_lm.attention_step import AttentionStep

ATTENTION = "realtime_serve_paged"


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_step: AttentionStep,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Stores the step's keys and values, then attends each sequence's queries to its context.

    query is [1, heads, T, head_dim], key and value are [1, kv_heads, T, head_dim]; what comes back is [1, T, heads,
    head_dim].
    """
    cache, layer = attention_step.cache, cast(int, module.layer_idx)
    cache.write(layer, attention_step.kv_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    query = query[0].transpose(0, 1)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for segment in attention_step.segments(sliding_window):
        keys, values = cache.gather(layer, segment.slots)
        attended = _attend(query.index_select(0, segment.tokens), keys, values, segment.mask, scaling, softcap)
        output.index_copy_(0, segment.tokens, attended)
    return output[None], None


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
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
        return _score(packed, keys, values, mask, scaling, softcap).reshape(query.shape)
    packed = query.view(queries, kv_heads, shared, head_dim).permute(1, 2, 0, 3)
    keys = keys.transpose(0, 1)[:, None].expand(-1, shared, -1, -1)
    values = values.transpose(0, 1)[:, None].expand(-1, shared, -1, -1)
    return _score(packed, keys, values, mask, scaling, softcap).permute(2, 0, 1, 3).reshape(query.shape)


def _score(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    # scaled_dot_product_attention has no place for what comes between the scores and the mask.
    scores = torch.matmul(query, keys.transpose(-1, -2)).mul_(scaling / softcap).tanh_().mul_(softcap).add_(mask)
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype), values)


AttentionInterface.register(ATTENTION, paged_attention)
