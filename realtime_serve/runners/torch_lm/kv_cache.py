"""The keys and values of every sequence's past positions, in blocks that any sequence can own."""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers.models.llama.configuration_llama import LlamaConfig


class KvCache:
    """Per layer a key and a value tensor, [num_blocks * block_size, kv_heads, head_dim]; a slot indexes into them."""

    def __init__(
        self, config: LlamaConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        shape = (num_blocks * block_size, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self._keys = [_zeros(shape, dtype, device) for _ in layers]
        self._values = [_zeros(shape, dtype, device) for _ in layers]

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


def block_bytes(config: LlamaConfig, block_size: int, dtype: torch.dtype) -> int:
    """What one block takes in all layers together."""
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return int(per_position * block_size * dtype.itemsize)
