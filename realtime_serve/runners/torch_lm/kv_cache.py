"""The keys and values of every sequence's past positions, in blocks that any sequence can own."""

from __future__ import annotations

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
        # On the CPU zeros, unlike a fill, commit a page only when it is first written.
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores one key and value, [kv_heads, head_dim], a slot."""
        self._keys[layer].index_copy_(0, slots, key)
        self._values[layer].index_copy_(0, slots, value)

    def gather(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values in these slots, [len(slots), kv_heads, head_dim]."""
        return self._keys[layer].index_select(0, slots), self._values[layer].index_select(0, slots)


def block_bytes(config: LlamaConfig, block_size: int, dtype: torch.dtype) -> int:
    """What one block takes in all layers together."""
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return int(per_position * block_size * dtype.itemsize)
