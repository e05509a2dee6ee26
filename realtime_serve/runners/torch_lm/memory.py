"""What a model takes of a device's memory: its weights, and a KV cache beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from realtime_serve.errors import ModelLoadError
from realtime_serve.runners.torch_lm.checkpoint import Checkpoint
from realtime_serve.runners.torch_lm.device import free_bytes
from realtime_serve.runners.torch_lm.kv_cache import KvShape

_DEFAULT_KV_CACHE_MB = 1024
# On a CPU the cache's memory is taken as it is used, and idle blocks would keep it.
_DEFAULT_PREFIX_CACHE_MB = 64
# Of what is free beside the weights; the rest is for a step's activations.
_KV_CACHE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class KvPlan:
    """How many KV blocks there are."""

    num_blocks: int
    cached_blocks: int
    """Those of them that are kept for their prefixes while nobody uses them."""


def plan_kv_cache(
    checkpoint: Checkpoint,
    *,
    weight_bytes: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_context: int,
    max_batch_size: int,
    kv_cache_mb: int | None,
    prefix_cache_mb: int | None,
) -> KvPlan:
    """As many blocks as the memory for them holds, or as a full batch can use.

    Raises ModelLoadError where they do not fit beside the weights, or do not hold one sequence.
    """
    bytes_each = KvShape.of(checkpoint.config).block_bytes(block_size, dtype)
    per_sequence = -(-max_context // block_size)
    free = free_bytes(device)
    if kv_cache_mb is None:
        budget = int((free - weight_bytes) * _KV_CACHE_SHARE)
        if device.type != "cuda":
            budget = min(budget, _DEFAULT_KV_CACHE_MB << 20)
        budget = max(budget, per_sequence * bytes_each)
    else:
        budget = kv_cache_mb << 20
    if budget // bytes_each < per_sequence:
        raise ModelLoadError(
            f"the KV cache of {budget >> 20} MB does not hold one sequence of {max_context} positions:"
            f" that takes kv_cache_mb={-(-per_sequence * bytes_each >> 20)}"
        )
    num_blocks = min(budget // bytes_each, per_sequence * max_batch_size)
    if weight_bytes + num_blocks * bytes_each > free:
        raise ModelLoadError(
            f"{checkpoint.source}: the weights take {weight_bytes / 1e6:.1f} MB as"
            f" {str(dtype).removeprefix('torch.')} and the KV cache {num_blocks * bytes_each / 1e6:.1f} MB, and"
            f" {device} has {free / 1e6:.1f} MB free"
        )
    if prefix_cache_mb is None and device.type != "cpu":
        return KvPlan(num_blocks, num_blocks)  # their memory is taken anyway
    kept = (_DEFAULT_PREFIX_CACHE_MB if prefix_cache_mb is None else prefix_cache_mb) << 20
    return KvPlan(num_blocks, min(num_blocks, kept // bytes_each))
