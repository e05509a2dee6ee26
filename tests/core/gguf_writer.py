"""Writes a model as a GGUF file, as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from transformers import PreTrainedModel

_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    rope_factors: list[float] | None = None,
    types: tuple[gguf.GGMLQuantizationType, ...] = (gguf.GGMLQuantizationType.F32,),
    **more: Any,
) -> None:
    """The matrices take turns in being stored as `types`; `more` are the architecture's keys, dots as underscores
    doubled, that stand beside or replace what the converter would write."""
    config = model.config
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_keys(config) | {key.replace("__", "."): value for key, value in more.items()}).items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, np.float32))
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    for turn, (name, parameter) in enumerate(model.named_parameters()):
        rows = parameter.detach().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            # Rotary pairs side by side.
            rows = rows.reshape(-1, 2, config.head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        if architecture == "gpt2" and ".c_" in name and rows.ndim == 2:
            rows = rows.T
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            rows = rows + 1
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        kind = types[turn % len(types)] if rows.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, quantize(np.ascontiguousarray(rows), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _keys(config: Any) -> dict[str, Any]:
    return _gpt2_keys(config) if config.model_type == "gpt2" else _llama_keys(config)


def _gpt2_keys(config: Any) -> dict[str, Any]:
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def _llama_keys(config: Any) -> dict[str, Any]:
    """Neither Gemma's query scale nor its layers' kinds are among them, and nothing says that Mistral has a window."""
    rope = config.rope_parameters
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if config.model_type == "gemma3_text":
        keys["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if config.model_type in ("gemma2", "gemma3_text"):
        keys["attention.sliding_window"] = config.sliding_window
        keys["attn_logit_softcapping"] = config.attn_logit_softcapping
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    keys["rope.freq_base"] = rope["rope_theta"]
    if rope["rope_type"] == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    return keys
