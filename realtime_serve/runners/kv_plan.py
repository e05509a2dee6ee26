"""How much of a device's memory a model's KV cache gets, beside its weights."""

from __future__ import annotations

from dataclasses import dataclass

from realtime_serve.errors import ModelLoadError

_DEFAULT_KV_CACHE_MB = 1024
# On a CPU the cache's memory is taken as it is used, and idle blocks would keep it.
_DEFAULT_PREFIX_CACHE_MB = 48
# Of what is free beside the weights; the rest is for a step's activations.
_KV_CACHE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class KvPlan:
    """How many KV blocks there are."""

    num_blocks: int
    cached_blocks: int
    """Those of them that are kept for their prefixes while nobody uses them."""


@dataclass(frozen=True, slots=True)
class KvRequest:
    """What a model and its limits ask for."""

    source: str
    """The model's file or folder, for messages."""
    weights: str
    """What its weights are kept as, for messages."""
    weight_bytes: int
    block_bytes: int
    block_size: int
    max_context: int
    max_batch_size: int
    kv_cache_mb: int | None = None
    prefix_cache_mb: int | None = None


def plan_kv_cache(request: KvRequest, *, device: str, free: int) -> KvPlan:
    """As many blocks as the memory for them holds, or as a full batch can use. `free` is what `device` has, in bytes.

    Raises ModelLoadError where they do not fit beside the weights, or do not hold one sequence.
    """
    each = request.block_bytes
    per_sequence = -(-request.max_context // request.block_size)
    if request.kv_cache_mb is None:
        budget = int((free - request.weight_bytes) * _KV_CACHE_SHARE)
        if not device.startswith("cuda"):
            budget = min(budget, _DEFAULT_KV_CACHE_MB << 20)
        budget = max(budget, per_sequence * each)
    else:
        budget = request.kv_cache_mb << 20
    if budget // each < per_sequence:
        raise ModelLoadError(
            f"the KV cache of {budget >> 20} MB does not hold one sequence of {request.max_context} positions:"
            f" that takes kv_cache_mb={-(-per_sequence * each >> 20)}"
        )
    num_blocks = min(budget // each, per_sequence * request.max_batch_size)
    if request.weight_bytes + num_blocks * each > free:
        raise ModelLoadError(
            f"{request.source}: the weights take {request.weight_bytes / 1e6:.1f} MB as {request.weights} and the KV"
            f" cache {num_blocks * each / 1e6:.1f} MB, and {device} has {free / 1e6:.1f} MB free"
        )
    if request.prefix_cache_mb is None and device != "cpu":
        return KvPlan(num_blocks, num_blocks)  # their memory is taken anyway
    kept = (_DEFAULT_PREFIX_CACHE_MB if request.prefix_cache_mb is None else request.prefix_cache_mb) << 20
    return KvPlan(num_blocks, min(num_blocks, kept // each))
