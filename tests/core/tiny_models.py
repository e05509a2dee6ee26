"""Randomly initialised Llamas, small enough to compare position by position with transformers' own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

VOCABULARY = 128
MAX_POSITIONS = 512


def tiny_llama(*, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers, four heads, two key-value heads; `changes` go to its configuration."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # They start as ones and zeros, which would hide a norm or a bias that is not applied.
            if "norm" in name or name.endswith("bias"):
                parameter.normal_(1.0, 0.2)
    return model.eval()


def save_tiny_llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    model = tiny_llama(**changes)
    model.save_pretrained(folder)
    return model


class TinyTokenizer:
    """As many tokens as the tiny models have; no text."""

    special_tokens = frozenset({0})
    eos_tokens = frozenset({1})

    def __init__(self, size: int = VOCABULARY) -> None:
        self._size = size

    def vocabulary_tokens(self) -> list[bytes]:
        return [b"%d" % token for token in range(self._size)]
