"""What GGUF calls each architecture that is supported, its tensors and its numbers, in transformers' terms.

The GGUF side is llama.cpp's: conversion/ for names and layouts, src/models/ for what no key says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from realtime_serve.checkpoints.gguf_metadata import GgufMetadata
from realtime_serve.errors import ModelLoadError

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor that rotary frequencies are divided by, where there is one."""

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)")
_EMBEDDING = "token_embd.weight"
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_MODEL_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}

_PROJECTIONS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA = {**_PROJECTIONS, "ffn_norm": "post_attention_layernorm"}
_QUERY_KEY_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA2 = {
    **_PROJECTIONS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_PROJECTIONS = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2 = {**_GPT2_PROJECTIONS, "attn_norm": "ln_1", "ffn_norm": "ln_2"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one is stored."""

    config: Callable[[GgufMetadata], dict[str, Any]]
    """What a config.json would say of it, but for the vocabulary."""
    layer_names: Mapping[str, str]
    model_names: Mapping[str, str] = field(default_factory=lambda: _MODEL_NAMES)
    layers: str = "model.layers"
    """What transformers calls the layers."""
    transposed: frozenset[str] = frozenset()
    """Projections whose weights transformers has inputs first; GGUF never does."""
    has_rotary_pairs: bool = False
    """Rows of the query and key projections are rotary pairs side by side; transformers has a head's two halves."""
    norm_offset: float = 0.0
    """What a norm's stored weight is more than transformers'."""

    def name_of(self, stored: str) -> str:
        """transformers' name of a tensor; the stored one where it has none."""
        stem, _, kind = stored.rpartition(".")
        layer = _LAYER_TENSOR.fullmatch(stem)
        if layer and layer[2] in self.layer_names:
            return f"{self.layers}.{layer[1]}.{self.layer_names[layer[2]]}.{kind}"
        return f"{self.model_names[stem]}.{kind}" if stem in self.model_names else stored

    def is_transposed(self, name: str) -> bool:
        """Whether transformers has the tensor, by its own name for it, the other way round."""
        return name.removesuffix(".weight").partition(".h.")[2].partition(".")[2] in self.transposed and (
            name.endswith(".weight")
        )


def architecture_of(metadata: GgufMetadata) -> Architecture:
    """Raises UnsupportedModelError where it is none of those below."""
    architecture = _ARCHITECTURES.get(str(metadata.architecture))
    if architecture is None:
        raise metadata.unsupported(
            f"architecture {metadata.architecture!r}", f"; supported: {', '.join(map(repr, _ARCHITECTURES))}"
        )
    return architecture


def config_of(metadata: GgufMetadata) -> dict[str, Any]:
    """What a config.json of the model would say. Raises UnsupportedModelError or ModelLoadError that names the key."""
    values = architecture_of(metadata).config(metadata)
    embedding = metadata.tensors.get(_EMBEDDING)
    if embedding is None:
        raise ModelLoadError(f"{metadata.source}: tensor {_EMBEDDING!r} is missing")
    return {**values, "vocab_size": embedding.shape[0] if embedding.shape else 0, "pad_token_id": None}


def _common_config(metadata: GgufMetadata) -> dict[str, Any]:
    """Of those that are built like Llama."""
    heads = metadata.count("attention.head_count")
    embedding = metadata.count("embedding_length")
    head_dim = metadata.count("attention.key_length", embedding // heads)
    if metadata.get("attention.value_length", head_dim) != head_dim:
        raise metadata.unsupported("values of another length than keys")
    if metadata.get("rope.dimension_count", head_dim) != head_dim:
        raise metadata.unsupported("rotary positions on a part of each head")
    if metadata.get("expert_count", 0):
        raise metadata.unsupported("a mixture of experts")
    return {
        "hidden_size": embedding,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.count("context_length"),
        "rms_norm_eps": metadata.require("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope_parameters(metadata),
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
    }


def _rope_parameters(metadata: GgufMetadata, theta: float = 10000.0) -> dict[str, Any]:
    parameters = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base", theta)}
    scaling = metadata.get("rope.scaling.type", "none")
    if scaling == "linear":
        return {**parameters, "rope_type": "linear", "factor": metadata.require("rope.scaling.factor", float)}
    if scaling != "none":
        raise metadata.unsupported(f"rope scaling {scaling!r}", "; supported: 'linear'")
    return parameters


def _llama(metadata: GgufMetadata) -> dict[str, Any]:
    """Mistral's models are stored under this name too; those with a sliding window may say so."""
    if metadata.has("attention.sliding_window"):
        window = metadata.count("attention.sliding_window")
        return _common_config(metadata) | {"model_type": "mistral", "sliding_window": window}
    return _common_config(metadata) | {
        "model_type": "llama",
        "attention_bias": "blk.0.attn_q.bias" in metadata.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in metadata.tensors,
    }


def _qwen2(metadata: GgufMetadata) -> dict[str, Any]:
    return _common_config(metadata) | {"model_type": "qwen2"}


def _qwen3(metadata: GgufMetadata) -> dict[str, Any]:
    bias = "blk.0.attn_q.bias" in metadata.tensors
    return _common_config(metadata) | {"model_type": "qwen3", "attention_bias": bias}


def _gemma(metadata: GgufMetadata) -> dict[str, Any]:
    return _common_config(metadata) | {"model_type": "gemma"}


def _gemma2(metadata: GgufMetadata) -> dict[str, Any]:
    return _common_config(metadata) | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": _query_scalar(metadata, layers_of_27b=46),
        "sliding_window": metadata.count("attention.sliding_window", 4096),
        "layer_types": _layer_types(metadata, period=2),
        "attn_logit_softcapping": metadata.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.get("final_logit_softcapping", 30.0),
    }


def _gemma3(metadata: GgufMetadata) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base_swa", 10000.0)}
    return _common_config(metadata) | {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _query_scalar(metadata, layers_of_27b=62),
        "sliding_window": metadata.count("attention.sliding_window"),
        "layer_types": _layer_types(metadata, period=6),
        "final_logit_softcapping": metadata.get("final_logit_softcapping", 0.0) or None,
        "rope_parameters": {
            "full_attention": _rope_parameters(metadata, theta=1e6),
            "sliding_attention": local,
        },
    }


def _gpt2(metadata: GgufMetadata) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": metadata.count("embedding_length"),
        "n_inner": metadata.count("feed_forward_length"),
        "n_layer": metadata.count("block_count"),
        "n_head": metadata.count("attention.head_count"),
        "n_positions": metadata.count("context_length"),
        "layer_norm_epsilon": metadata.require("attention.layer_norm_epsilon", float),
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
    }


def _query_scalar(metadata: GgufMetadata, *, layers_of_27b: int) -> int:
    """No key has it: it is a head's length but in the models of 27 billion, known by their number of layers."""
    embedding_share = metadata.count("embedding_length") // metadata.count("attention.head_count")
    if metadata.count("block_count") == layers_of_27b:
        return embedding_share
    return metadata.count("attention.key_length", embedding_share)


def _layer_types(metadata: GgufMetadata, *, period: int) -> list[str]:
    """Of every `period` layers the last sees everything. The file may say otherwise: by a number or layer by layer."""
    layers = range(metadata.count("block_count"))
    pattern = metadata.raw("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        slides = [bool(pattern[layer]) if layer < len(pattern) else False for layer in layers]
    else:
        period = metadata.get("attention.sliding_window_pattern", period)
        slides = [period > 0 and (layer + 1) % period != 0 for layer in layers]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


# By `general.architecture`.
_ARCHITECTURES = {
    "llama": Architecture(_llama, _LLAMA, has_rotary_pairs=True),
    "qwen2": Architecture(_qwen2, _LLAMA),
    "qwen3": Architecture(_qwen3, {**_LLAMA, **_QUERY_KEY_NORMS}),
    "gemma": Architecture(_gemma, _LLAMA, norm_offset=1.0),
    "gemma2": Architecture(_gemma2, _GEMMA2, norm_offset=1.0),
    "gemma3": Architecture(_gemma3, {**_GEMMA2, **_QUERY_KEY_NORMS}, norm_offset=1.0),
    "gpt2": Architecture(
        _gpt2,
        _GPT2,
        _GPT2_MODEL_NAMES,
        layers="transformer.h",
        transposed=frozenset(_GPT2_PROJECTIONS.values()),
    ),
}
