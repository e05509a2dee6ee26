"""The keys and values of every sequence's past positions, in blocks that any sequence can own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a position takes, the same in every layer."""

    layers: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> KvShape:
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    def block_bytes(self, block_size: int, dtype: torch.dtype) -> int:
        """What one block takes in all layers together."""
        return 2 * self.layers * self.heads * self.head_dim * block_size * dtype.itemsize


class KvCache:
    """Per layer a key and a value tensor, [num_blocks * block_size, kv_heads, head_dim]; a slot indexes into them."""

    def __init__(
        self, shape: KvShape, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size, self.dtype, self.device = block_size, dtype, device
        size = (num_blocks * block_size, shape.heads, shape.head_dim)
        self._keys = [_zeros(size, dtype, device) for _ in range(shape.layers)]
        self._values = [_zeros(size, dtype, device) for _ in range(shape.layers)]

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores one key and value, [kv_heads, head_dim], a slot."""
        self._keys[layer].index_copy_(0, slots, key)
        self._values[layer].index_copy_(0, slots, value)

    def gather(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values in these slots, [len(slots), kv_heads, head_dim]."""
        return self._keys[layer].index_select(0, slots), self._values[layer].index_select(0, slots)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU in pages that are committed when they are first written: torch.zeros writes them all, which takes a
    cache of 1 GB a second and the gigabyte."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
