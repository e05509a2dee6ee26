"""Randomly initialised models, small enough to compare position by position with transformers' own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
MAX_POSITIONS = 512
WINDOW = 20

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.2,
    # Those that a family has by default lie beyond the tiny vocabulary.
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
# What makes a family's tiny model show what is its own. Beside a window there is a layer without one.
_OWN: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "num_hidden_layers": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
        "initializer_range": 0.1,
    },
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "mistral": {"sliding_window": WINDOW},
    "olmo": {"clip_qkv": 2.0},
    "olmo3": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 32, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": WINDOW},
}


# One of each kind of rotary embedding whose frequencies are computed from the configuration alone.
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A few layers, four heads, two key-value heads where the family shares them; `changes` go to its configuration."""
    settings = _SIZES | _OWN.get(family, {}) | changes
    if family in ("gpt2", "gpt_neox"):
        settings.pop("num_key_value_heads")
    if family == "gpt2":
        settings = {_GPT2_NAMES.get(name, name): value for name, value in settings.items()}
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[family](**settings), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # They start as ones and zeros, which would hide a norm or a bias that is not applied.
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.normal_(0.5, 0.2)
    return model.eval()


def save_tiny_model(folder: Path, family: str, **changes: Any) -> PreTrainedModel:
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    return model


def tiny_llama(**changes: Any) -> PreTrainedModel:
    return tiny_model("llama", **changes)


def save_tiny_llama(folder: Path, **changes: Any) -> PreTrainedModel:
    return save_tiny_model(folder, "llama", **changes)


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors, their names with dots for double underscores; None removes one."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path)


class TinyTokenizer:
    """As many tokens as the tiny models have; no text."""

    special_tokens = frozenset({0})
    eos_tokens = frozenset({1})

    def __init__(self, size: int = VOCABULARY) -> None:
        self._size = size

    def vocabulary_tokens(self) -> list[bytes]:
        return [b"%d" % token for token in range(self._size)]
